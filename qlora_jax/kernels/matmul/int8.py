"""The matmul with an 8-bit weight, in plain JAX."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.quant.int8 import Int8Tensor


@jax.custom_vjp
def int8_matmul(x: Float[Array, "*B K"], weight: Int8Tensor) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ for one matrix, in the dtype of x; differentiable in x only."""
    x, weight = jax.lax.optimization_barrier((x, weight))
    dense = weight.dequantize(x.dtype)
    if math.prod(x.shape[:-1]) == 1:
        # XLA fuses a sum with the dequantization, so that one row's generation reads the codes and writes no weight.
        y = jnp.sum(dense.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32), axis=-1)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return jnp.einsum("...K,NK->...N", x, dense)


def _forward(x, weight):
    # As in nf4_matmul, what is kept is the quantized weight, and barriers keep the two dequantizations apart.
    return int8_matmul(x, weight), weight


def _backward(weight, dy):
    dy, weight = jax.lax.optimization_barrier((dy, weight))
    return jnp.einsum("...N,NK->...K", dy, weight.dequantize(dy.dtype)), None


int8_matmul.defvjp(_forward, _backward)
