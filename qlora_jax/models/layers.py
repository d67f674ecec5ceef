"""The building blocks of a decoder layer. Weights keep the Hugging Face orientation, `[out, in]`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.kernels import nf4_matmul
from qlora_jax.lora.init import key_for
from qlora_jax.nf4 import NF4Tensor


class Frozen(nnx.Variable):
    """A weight of the base model that is never trained: an array or an NF4Tensor."""


class Linear(nnx.Module):
    """y = x · Wᵀ + b, plus the adapter's update where there is one. W is an array or an NF4Tensor."""

    def __init__(self, weight, bias=None, *, kind=Frozen):
        self.weight = kind(weight)
        self.bias = None if bias is None else kind(bias)
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Float[Array, "*B N"]:
        weight = self.weight.get_value()
        if isinstance(weight, NF4Tensor):
            y = nf4_matmul(x, weight)
        else:
            y = jnp.einsum("...K,NK->...N", x, weight.astype(x.dtype))
        if self.bias is not None:
            y += self.bias.get_value().astype(x.dtype)
        return y if self.lora is None else y + self.lora(x, key)


class Embedding(nnx.Module):
    """A table `[V, D]` of token vectors."""

    def __init__(self, weight, *, kind=Frozen):
        self.weight = kind(weight)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.weight.get_value()[tokens]


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
        gate = nnx.silu(self.gate_proj(x, subkey(key, "gate")))
        return self.down_proj(gate * self.up_proj(x, subkey(key, "up")), subkey(key, "down"))


def subkey(key: Array | None, name: str) -> Array | None:
    """The dropout key of one part of a layer; None, which turns dropout off, stays None."""
    return None if key is None else key_for(key, name)
