"""The definition of the NF4 matmul in plain JAX. Every kernel is held to these two functions."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.kernels.dequantize import reference
from qlora_jax.quant.nf4 import NF4Layer

Dequantize = Callable[[NF4Layer, object], Float[Array, "N K"]]


def forward(
    x: Float[Array, "*B K"], layer: NF4Layer, dequantize: Dequantize = reference.dequantize
) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ, in the dtype of x."""
    return jnp.einsum("...K,NK->...N", x, dequantize(layer, x.dtype))


def backward(
    dy: Float[Array, "*B N"], layer: NF4Layer, dequantize: Dequantize = reference.dequantize
) -> Float[Array, "*B K"]:
    """dx = dy · dequantize(W), in the dtype of dy."""
    return jnp.einsum("...N,NK->...K", dy, dequantize(layer, dy.dtype))
