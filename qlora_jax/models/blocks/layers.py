"""The building blocks of a decoder layer. Weights keep the Hugging Face orientation, `[out, in]`."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.kernels import int8_matmul, nf4_matmul, nf4_matmul_group
from qlora_jax.kernels.matmul.mixed import mixed_matmul
from qlora_jax.kernels.tiles import FEW_ROWS
from qlora_jax.lora.init import key_for
from qlora_jax.quant.host_table import HostTable
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.mixed import MixedLayer
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor
from qlora_jax.quant.storage import slice_rows, take_rows


class Frozen(nnx.Variable):
    """A weight of the base model that is never trained: an array, an NF4Tensor, a MixedStack or an Int8Tensor."""


class Linear(nnx.Module):
    """y = x · Wᵀ + b, plus the adapter's update where there is one. W is an array, or in NF4 or int8."""

    def __init__(self, weight, bias=None, *, kind=Frozen):
        self.weight = kind(weight)
        self.bias = None if bias is None else kind(bias)
        self.lora = nnx.data(None)

    @property
    def packed(self) -> bool:
        """Whether W is in NF4, in every layer."""
        return isinstance(self.weight.get_value(), NF4Tensor | NF4Layer)

    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Float[Array, "*B N"]:
        return linear_group(x, [self], [key])[0]

    def outputs(self, start: int | Int[Array, ""], size: int) -> "Linear":
        """The layer of `size` of the outputs, from `start` on, which may be traced; raises as `slice_rows` does."""
        bias = None if self.bias is None else lax.dynamic_slice_in_dim(self.bias.get_value(), start, size)
        part = Linear(slice_rows(self.weight.get_value(), start, size), bias, kind=type(self.weight))
        part.lora = nnx.data(None if self.lora is None else self.lora.outputs(start, size))
        return part


def linear_group(
    x: Float[Array, "*B K"], linears: Sequence[Linear], keys: Sequence[Array | None]
) -> list[Float[Array, "*B N"]]:
    """Several linear layers of one x, such as the query, key and value projections; packed ones share a launch."""
    updates = [None if linear.lora is None else linear.lora(x, key) for linear, key in zip(linears, keys, strict=True)]
    if any(linear.lora is not None for linear in linears) and _many_rows(x):
        # The updates come first, so that in the backward pass theirs come last: the dequantized weight is gone by then.
        x, updates = lax.optimization_barrier((x, updates))
    if all(linear.packed for linear in linears):
        ys = nf4_matmul_group(x, [linear.weight.get_value() for linear in linears])
    else:
        ys = [_matmul(x, linear.weight.get_value()) for linear in linears]
    return [_completed(*parts) for parts in zip(linears, ys, updates, strict=True)]


def _matmul(x, weight):
    if isinstance(weight, NF4Tensor | NF4Layer):
        return nf4_matmul(x, weight)
    if isinstance(weight, Int8Tensor):
        return int8_matmul(x, weight)
    if isinstance(weight, MixedLayer):
        return mixed_matmul(x, weight)
    return jnp.einsum("...K,NK->...N", x, weight.astype(x.dtype))


def _many_rows(x) -> bool:
    """Whether memory counts: for the few rows of a step of generation, a barrier costs a kernel and saves nothing."""
    return math.prod(x.shape[:-1]) > FEW_ROWS


def _completed(linear: Linear, y, update):
    """A product with its bias and its adapter's update."""
    if linear.bias is not None:
        y += linear.bias.get_value().astype(y.dtype)
    return y if update is None else y + update


class Embedding(nnx.Module):
    """A table `[V, D]` of token vectors: an array, or in NF4 or int8. In a HostTable nothing is looked up here."""

    def __init__(self, weight, *, kind=Frozen):
        self.weight = kind(weight)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        table = self.weight.get_value()
        if isinstance(table, HostTable):
            raise TypeError("the embedding stays in host memory: look up there, and pass the rows as `embedded`")
        return take_rows(table, tokens)


class RMSNorm(nnx.Module):
    """x / rms(x) · w, normalised in float32 (arXiv 1910.07467)."""

    def __init__(self, weight, *, eps: float, kind=Frozen):
        self.weight = kind(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        normal = wide / jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * normal.astype(x.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear):
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Float[Array, "B T D"]:
        gate, up = linear_group(x, [self.gate_proj, self.up_proj], [subkey(key, "gate"), subkey(key, "up")])
        if self.gate_proj.lora is not None and self.up_proj.lora is not None and _many_rows(x):
            # Products and updates are added here, not where they are used: two activations of this width less.
            gate, up = lax.optimization_barrier((gate, up))
        return self.down_proj(nnx.silu(gate) * up, subkey(key, "down"))


def subkey(key: Array | None, name: str) -> Array | None:
    """The dropout key of one part of a layer; None, which turns dropout off, stays None."""
    return None if key is None else key_for(key, name)
