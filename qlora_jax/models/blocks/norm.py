"""Normalisation."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.models.specs import NormSpec


def normal(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    return wide / jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + w), normalised in float32."""

    def __init__(self, weight, spec: NormSpec, *, kind=Frozen):
        self.weight = kind(weight)
        self.spec = spec

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight, y = self.weight.get_value(), normal(x, self.spec.eps)
        if self.spec.offset:
            weight = self.spec.offset + weight.astype(jnp.float32)
        if self.spec.wide:
            return (y * weight.astype(jnp.float32)).astype(x.dtype)
        return weight.astype(x.dtype) * y.astype(x.dtype)
