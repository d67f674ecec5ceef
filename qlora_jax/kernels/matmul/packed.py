"""The matmul with a weight of any packed format, in plain JAX: what a format without kernels of its own takes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.quant.packed import Packed, PackedMatrix


@jax.custom_vjp
def packed_matmul(x: Float[Array, "*B K"], weight: Packed | PackedMatrix) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ for one matrix, in the dtype of x; differentiable in x only."""
    x, dense = _dequantized(x, weight)
    if math.prod(x.shape[:-1]) == 1:
        # XLA fuses a sum with the dequantization, so that one row's generation reads the codes and writes no weight.
        y = jnp.sum(dense.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32), axis=-1)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return jnp.einsum("...K,NK->...N", x, dense)


def packed_matmul_transposed(dy: Float[Array, "*B N"], weight: Packed | PackedMatrix) -> Float[Array, "*B K"]:
    """dx = dy · dequantize(W): what the derivative of `packed_matmul` computes."""
    dy, dense = _dequantized(dy, weight)
    return jnp.einsum("...N,NK->...K", dy, dense)


def _dequantized(x, weight: Packed | PackedMatrix):
    # As in nf4_matmul, barriers keep the dequantizations of the two passes apart. That of a stack is on its index:
    # one on its arrays would copy them.
    if isinstance(weight, PackedMatrix):
        x, index = jax.lax.optimization_barrier((x, weight.index))
        return x, weight._replace(index=index).take().dequantize(x.dtype)
    x, matrix = jax.lax.optimization_barrier((x, weight))
    return x, matrix.dequantize(x.dtype)


def _forward(x, weight):
    # As in nf4_matmul, what is kept is the packed weight.
    return packed_matmul(x, weight), weight


def _backward(weight, dy):
    return packed_matmul_transposed(dy, weight), None


packed_matmul.defvjp(_forward, _backward)
