"""Linear layers, in whatever way their weights are stored. Weights keep the Hugging Face orientation, `[out, in]`."""

import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.kernels.linear import matmul_group
from qlora_jax.kernels.tiles import FEW_ROWS
from qlora_jax.lora.init import key_for
from qlora_jax.quant.packed import slice_rows


class Frozen(nnx.Variable):
    """A weight of the base model that is never trained: an array, or packed."""


class Weighted(nnx.Module):
    """A weight, perhaps a bias, and perhaps an adapter."""

    def __init__(self, weight, bias=None, *, kind=Frozen):
        self.weight = kind(weight)
        self.bias = None if bias is None else kind(bias)
        self.lora = nnx.data(None)


class Linear(Weighted):
    """y = x · Wᵀ + b, as its adapter changes it where there is one."""

    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Float[Array, "*B N"]:
        return linear_group(x, [self], [key])[0]

    def outputs(self, start: int | Int[Array, ""], size: int) -> "Linear":
        """The layer of `size` of the outputs, from `start` on, which may be traced; raises as `slice_rows` does."""
        bias = None if self.bias is None else lax.dynamic_slice_in_dim(self.bias.get_value(), start, size)
        part = Linear(slice_rows(self.weight.get_value(), start, size), bias, kind=type(self.weight))
        part.lora = nnx.data(None if self.lora is None else self.lora.outputs(start, size))
        return part

    def completed(self, y: Float[Array, "*B N"], made) -> Float[Array, "*B N"]:
        """A product x · Wᵀ with the bias, and with the adapter, which has `made` its part of x before."""
        bias = None if self.bias is None else self.bias.get_value()
        if bias is not None:
            y += bias.astype(y.dtype)
        return y if self.lora is None else self.lora.apply(y, made, self.weight.get_value(), bias)


def linear_group(
    x: Float[Array, "*B K"], linears: Sequence[Linear], keys: Sequence[Array | None]
) -> list[Float[Array, "*B N"]]:
    """Several linear layers of one x, such as the query, key and value projections; packed ones share a launch."""
    made = [None if linear.lora is None else linear.lora(x, key) for linear, key in zip(linears, keys, strict=True)]
    if any(linear.lora is not None for linear in linears) and many_rows(x):
        # Adapters come first, so that in the backward pass theirs come last: the dequantized weight is gone by then.
        x, made = lax.optimization_barrier((x, made))
    ys = matmul_group(x, [linear.weight.get_value() for linear in linears])
    return [linear.completed(y, part) for linear, y, part in zip(linears, ys, made, strict=True)]


def many_rows(x: jax.Array) -> bool:
    """Whether memory counts: for the few rows of a step of generation, a barrier costs a kernel and saves nothing."""
    return math.prod(x.shape[:-1]) > FEW_ROWS


def subkey(key: Array | None, name: str) -> Array | None:
    """The dropout key of one part of a layer; None, which turns dropout off, stays None."""
    return None if key is None else key_for(key, name)
