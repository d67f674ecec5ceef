"""The one place that knows how this project's kernels are called.

A kernel that this device cannot run raises NotHere; its row then says so.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp

from qlora_jax import kernels
from qlora_jax.kernels import backend
from qlora_jax.kernels.attention import dispatch
from qlora_jax.kernels.matmul import triton
from qlora_jax.kernels.tiles import MatmulTiles, tiles_for
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor

IMPLEMENTATIONS = ("auto", "pallas", "mosaic", "xla")
ATTENTION = dispatch.IMPLEMENTATIONS
# Beyond so many of its own tiles the fused kernel is not tried: it reads the weights once for each of them.
MOST_TILES = 4


class NotHere(Exception):
    """This device cannot run the implementation."""


def using(implementation: str):
    """A context in which `implementation` runs."""
    return kernels.using(implementation)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns the dispatch's refusal of a kernel that cannot run here into NotHere."""
    try:
        yield
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        raise NotHere(str(error)) from error


def layer_of(stack: NF4Tensor, index) -> NF4Layer:
    """One matrix of a stack, by reference, as the decoder's scan hands it on."""
    return NF4Layer(stack, index)


def dequantize(weight: NF4Tensor, dtype=None):
    """`[*L, N, K]` of a packed weight, by the implementation in use."""
    with refusals():
        if not weight.leading:
            return kernels.dequantize(weight, dtype)
        layers = range(weight.leading[0])
        return jnp.stack([kernels.dequantize(layer_of(weight, jnp.int32(i)), dtype) for i in layers])


def matmul(x, weight: NF4Tensor | NF4Layer):
    """x · dequantize(W)ᵀ as the model computes it."""
    with refusals():
        return kernels.nf4_matmul(x, weight)


def fused(x, stack: NF4Tensor, layer):
    """The fused kernel `[M, N]` on one matrix of a stack, also for more rows of x than the model would give it."""
    tiles = fused_tiles(len(x))
    parts = [x[i : i + tiles.tokens] for i in range(0, len(x), tiles.tokens)]
    return jnp.concatenate([triton.matmul(part, [layer_of(stack, layer)], tiles)[0] for part in parts])


def fused_tiles(rows: int) -> MatmulTiles:
    """The kernel's sizes for so many rows, or its largest ones, which then run several times."""
    capability = backend.capability()
    if capability is None or capability < backend.OLDEST:
        raise NotHere("the fused matmul runs on NVIDIA GPUs from compute capability 8.0 on")
    sizes = tiles_for(capability)
    tiles = sizes.for_tokens(rows) or sizes.matmul[-1]
    if rows > MOST_TILES * tiles.tokens:
        raise NotHere(f"the fused matmul is not meant for {rows} rows: its largest tile holds {tiles.tokens}")
    return tiles


def group(x, weights: list):
    """Several weights on one x, in one launch where the fused kernel takes them."""
    with refusals():
        return kernels.nf4_matmul_group(x, weights)


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """A context in which every attention that is traced is implementation `name`, whatever the model would choose."""
    with mock.patch.object(dispatch, "choose", lambda *_, **__: name):
        yield
