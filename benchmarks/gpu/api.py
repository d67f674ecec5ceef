"""The one place that knows how this project's kernels are called.

A kernel that this version or this device does not have raises NotHere; its row then says so.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp

from qlora_jax import kernels, nf4
from qlora_jax.nf4 import NF4Tensor

IMPLEMENTATIONS = ("auto", "pallas", "mosaic", "xla")
# Beyond so many of its own tiles the fused kernel is not tried: it reads the weights once for each of them.
MOST_TILES = 4


class NotHere(Exception):
    """This version, or this device, has no such implementation."""


@contextlib.contextmanager
def using(implementation: str) -> Iterator[None]:
    """A context in which `implementation` runs."""
    if not hasattr(kernels, "using"):
        if implementation not in ("auto", "xla"):
            raise NotHere(f"this version has no {implementation} kernels")
        yield
        return
    with kernels.using(implementation):
        try:
            kernels.chosen()
        except RuntimeError as error:
            raise NotHere(str(error)) from error
        yield


def layer_of(stack: NF4Tensor, index):
    """One matrix of a stack, by reference where this version can: a copy of the slice is not what is measured."""
    return nf4.NF4Layer(stack, index) if hasattr(nf4, "NF4Layer") else stack[index]


def dequantize(weight: NF4Tensor, dtype=None):
    """`[*L, N, K]` of a packed weight, by the implementation in use."""
    kernel = getattr(kernels, "dequantize", nf4.dequantize)
    if weight.stack:
        return jnp.stack([kernel(layer_of(weight, jnp.int32(i)), dtype) for i in range(weight.stack[0])])
    return kernel(weight, dtype)


def matmul(x, weight):
    """x · dequantize(W)ᵀ as the model computes it."""
    return kernels.nf4_matmul(x, weight)


def fused(x, stack: NF4Tensor, layer):
    """The fused kernel `[M, N]` on one matrix of a stack, also for more rows of x than the model would give it."""
    try:
        module = importlib.import_module("qlora_jax.kernels.matmul.triton")
    except ImportError as error:
        raise NotHere("this version has no fused matmul kernel") from error
    if "tiles" not in inspect.signature(module.matmul).parameters:
        return module.matmul(x, stack, layer)
    tiles = _tiles(len(x))
    parts = [x[i : i + tiles.tokens] for i in range(0, len(x), tiles.tokens)]
    return jnp.concatenate([module.matmul(part, [layer_of(stack, layer)], tiles)[0] for part in parts])


def _tiles(rows: int):
    """The kernel's sizes for so many rows, or its largest ones, which then run several times."""
    choice = kernels.chosen()
    if choice.name != "triton":
        raise NotHere(f"the fused matmul does not run here: {choice.reason}")
    sizes = importlib.import_module("qlora_jax.kernels.tiles").tiles_for(choice.capability)
    tiles = sizes.for_tokens(rows) or sizes.matmul[-1]
    if rows > MOST_TILES * tiles.tokens:
        raise NotHere(f"the fused matmul is not meant for {rows} rows: its largest tile holds {tiles.tokens}")
    return tiles


def group(x, weights: list):
    """Several weights on one x, in one launch."""
    if not hasattr(kernels, "nf4_matmul_group"):
        raise NotHere("this version has no grouped matmul")
    return kernels.nf4_matmul_group(x, weights)


def attention_variants() -> tuple[str, ...]:
    """The implementations of attention that the model can run; empty where there is only one."""
    try:
        return importlib.import_module("qlora_jax.kernels.attention").IMPLEMENTATIONS
    except (ImportError, AttributeError):
        return ()


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """A context in which every attention that is traced is implementation `name`, whatever the model would choose."""
    dispatch = importlib.import_module("qlora_jax.kernels.attention.dispatch")
    with mock.patch.object(dispatch, "choose", lambda *_, **__: name):
        yield
