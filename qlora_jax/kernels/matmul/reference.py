"""The definition of the NF4 matmul in plain JAX. Every kernel is held to these two functions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nf4 import NF4Tensor, dequantize


def forward(x: Float[Array, "*B K"], weight: NF4Tensor) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ, in the dtype of x."""
    return jnp.einsum("...K,NK->...N", x, dequantize(weight, x.dtype))


def backward(dy: Float[Array, "*B N"], weight: NF4Tensor) -> Float[Array, "*B K"]:
    """dx = dy · dequantize(W), in the dtype of dy."""
    return jnp.einsum("...N,NK->...K", dy, dequantize(weight, dy.dtype))
