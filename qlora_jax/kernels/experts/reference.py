"""The definition of the experts' product in plain JAX: every pair by itself, with weights that are dense."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_matmul(
    x: Float[Array, "T k K"], weight: Float[Array, "E N K"], index: Int[Array, "T k"]
) -> Float[Array, "T k N"]:
    """y[t, j] = x[t, j] · W[index[t, j]]ᵀ, in the dtype of x."""
    return jnp.einsum("TjK,TjNK->TjN", x, weight.astype(x.dtype)[index])
