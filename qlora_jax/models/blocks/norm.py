"""Normalisation."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.blocks.linear import Frozen


class RMSNorm(nnx.Module):
    """x / rms(x) · w, normalised in float32 (arXiv 1910.07467)."""

    def __init__(self, weight, *, eps: float, kind=Frozen):
        self.weight = kind(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        normal = wide / jnp.sqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * normal.astype(x.dtype)
