"""QLoRA on a parameter pytree that is not ours: pack, add adapters, mask, merge.

The tree stays one tree: `lora_init` replaces a weight by a LoraWeight that holds the frozen base with its A and B.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels.linear import matmul
from qlora_jax.lora.init import init_pair
from qlora_jax.lora.low_rank import low_rank_delta, low_rank_update
from qlora_jax.lora.targets import Target
from qlora_jax.quant.nf4 import quantize
from qlora_jax.quant.packed import is_packed

Predicate = Callable[[str, Any], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LoraWeight:
    """A frozen weight with its adapter, for a layer that computes `x · W` with W `[in, out]` (Flax's kernels).

    Attributes:
      base: the transposed weight `[out, in]`, packed, or W itself `[in, out]` as it was.
      A: float32 `[r, in]`.
      B: float32 `[out, r]`.
      scale: alpha / r.
    """

    base: Any
    A: Any
    B: Any
    scale: float = dataclasses.field(metadata={"static": True})


def quantize_tree(params: Any, predicate: Predicate, *, double: bool = True) -> Any:
    """The tree with every chosen kernel `[in, out]` packed as an NF4Tensor of its transpose `[out, in]`.

    Args:
      params: any pytree of arrays.
      predicate: called with each leaf's path ("encoder/dense/kernel") and the leaf; True packs it.
      double: quantize the scales a second time.

    Raises:
      ValueError: nothing was chosen, or a chosen leaf is no matrix.
    """
    paths, treedef = _flatten(params)
    if not any(predicate(path, leaf) for path, leaf in paths):
        raise ValueError(f"quantize_tree: the predicate chose none of {_listing(paths)}")
    return treedef.unflatten(
        [quantize(_matrix(path, leaf).T, double=double) if predicate(path, leaf) else leaf for path, leaf in paths]
    )


def lora_init(params: Any, predicate: Predicate, key: jax.Array, *, rank: int = 16, alpha: float = 16.0) -> Any:
    """The tree with an adapter beside every chosen weight: A drawn as PEFT draws it, B zero.

    Args:
      params: a pytree whose chosen leaves are matrices `[in, out]` or NF4Tensors made by `quantize_tree`.
      predicate: as in `quantize_tree`; an NF4Tensor counts as one leaf.

    Raises:
      ValueError: nothing was chosen, or a chosen leaf is no matrix.
    """
    paths, treedef = _flatten(params)
    if not any(predicate(path, leaf) for path, leaf in paths):
        raise ValueError(f"lora_init: the predicate chose none of {_listing(paths)}")
    return treedef.unflatten(
        [_adapted(path, leaf, key, rank, alpha) if predicate(path, leaf) else leaf for path, leaf in paths]
    )


def lora_mask(params: Any) -> Any:
    """True at what training may change, False at everything else, over the whole tree.

    It follows from the kind and never from a name: A and B of a LoraWeight, and in a Flax NNX state every `nnx.Param`
    (of which LoRAParam is one).
    """

    def mask(node: Any) -> Any:
        if isinstance(node, LoraWeight):
            return LoraWeight(_all(False, node.base), True, True, node.scale)
        if isinstance(node, nnx.Variable):
            return _all(isinstance(node, nnx.Param), node)
        return False

    return jax.tree.map(mask, params, is_leaf=lambda node: isinstance(node, LoraWeight | nnx.Variable))


def merge_tree(params: Any, dtype: Any = None) -> Any:
    """The tree as the original model expects it: packed weights dequantized, adapters added in float32, cast once.

    Inside jit this is also the simplest way to run a model of one's own; `lora_dot` never holds the merged weight.
    """

    def dense(node: Any) -> Any:
        if is_packed(node):
            return node.dequantize().T.astype(dtype or node.dtype)
        if isinstance(node, LoraWeight):
            weight = dense(node.base)
            update = low_rank_delta(node.A, node.B, node.scale).T
            return (weight.astype(jnp.float32) + update).astype(dtype or weight.dtype)
        return node

    return jax.tree.map(dense, params, is_leaf=_is_weight)


def lora_dot(x: jax.Array, weight: Any) -> jax.Array:
    """x · W for a weight of such a tree: a LoraWeight, an NF4Tensor or a plain `[in, out]` array."""
    if isinstance(weight, LoraWeight):
        return lora_dot(x, weight.base) + low_rank_update(x, weight.A, weight.B, weight.scale)
    return matmul(x, weight) if is_packed(weight) else x @ weight.astype(x.dtype)


def _adapted(path: str, leaf: Any, key: jax.Array, rank: int, alpha: float) -> LoraWeight:
    fan_out, fan_in = leaf.shape if is_packed(leaf) else _matrix(path, leaf).shape[::-1]
    target = Target(rank, alpha / rank)
    A, B = init_pair(key, path, target, (fan_out, fan_in, rank))
    return LoraWeight(leaf, A, B, target.scale)


def _flatten(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, treedef = jax.tree.flatten_with_path(params, is_leaf=_is_weight)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef


def _is_weight(node: Any) -> bool:
    return is_packed(node) or isinstance(node, LoraWeight)


def _matrix(path: str, leaf: Any) -> Any:
    if getattr(leaf, "ndim", 0) != 2:
        raise ValueError(f"{path} has shape {getattr(leaf, 'shape', None)}: only a matrix [in, out] can be chosen")
    return leaf


def _all(value: bool, tree: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)


def _listing(paths: list[tuple[str, Any]]) -> str:
    names = [path for path, _ in paths]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
