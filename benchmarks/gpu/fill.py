"""Random arrays in place of shapes, made on the device: neither a checkpoint nor a quantization is needed."""

import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.models.config import ModelConfig
from qlora_jax.quant.nf4 import NF4Tensor, dynamic_map
from qlora_jax.quant.nf4.tensor import packed_shapes

# With these a random block scale lies near 0.05, the largest of 64 values of N(0, 0.02²), and is never negative.
OFFSET, NESTED_ABSMAX = 0.05, 0.02
DEVIATION = 0.02
SMALL = 2**22


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key, shape: tuple[int, ...], dtype: Any):
    """Random bytes, or N(0, DEVIATION²)."""
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(DEVIATION, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _draw_stack(key, shape: tuple[int, ...], dtype: Any):
    """The same a layer at a time: the generator's temporaries are several times what it makes."""
    return jax.lax.map(lambda k: _draw(k, shape[1:], dtype), jax.random.split(key, shape[0]))


def random_array(key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bytes or normal values, in stacks one layer after the other."""
    dtype = jnp.dtype(dtype)
    stacked = len(shape) > 2 and math.prod(shape) > SMALL
    return (_draw_stack if stacked else _draw)(key, tuple(shape), dtype)


def _leaf(seed: int, path: tuple, leaf: Any) -> Any:
    """One array of a state; those of a packed weight are told apart by the name at the path's end."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    # The same state has the same bytes in every process, so crc32 and not hash().
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
    name = getattr(path[-1], "name", None)
    if any(getattr(part, "key", None) == "scale" for part in path):
        return jnp.ones(leaf.shape, leaf.dtype)  # alpha / rank
    if name == "nested_levels":
        return jnp.broadcast_to(jnp.asarray(dynamic_map()), leaf.shape)
    if name in ("nested_absmax", "offset"):
        return jnp.full(leaf.shape, NESTED_ABSMAX if name == "nested_absmax" else OFFSET, leaf.dtype)
    if name == "absmax" and leaf.dtype == jnp.float32:
        return jnp.abs(random_array(key, leaf.shape, leaf.dtype)) + OFFSET
    if name is None and any("norm" in str(part) for part in path):
        return jnp.ones(leaf.shape, leaf.dtype)
    return random_array(key, leaf.shape, leaf.dtype)


def random_state(tree: Any, seed: int = 0) -> Any:
    """`tree` with random arrays in place of its `jax.ShapeDtypeStruct`s; norms and adapters' scales are one."""
    return jax.tree_util.tree_map_with_path(partial(_leaf, seed), tree)


def packed(shape: tuple[int, int], seed: int = 0, *, stack: tuple[int, ...] = (), double: bool = True) -> NF4Tensor:
    """A bfloat16 weight's packed form with random codes."""
    return random_state(packed_shapes(shape, jnp.bfloat16, double=double, leading=stack), seed)


def zeros(tree: Any) -> Any:
    """Zeros in place of shapes: what Optax starts Adam's state with."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a, tree)


def random_tokens(config: ModelConfig, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """int32 ids of the vocabulary."""
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size, jnp.int32)
