"""The NF4 matmul with its derivative: the one dispatch point between the model and the kernels."""

import jax
from jaxtyping import Array, Float

from qlora_jax.kernels.matmul import reference
from qlora_jax.nf4 import NF4Tensor


@jax.custom_vjp
def nf4_matmul(x: Float[Array, "*B K"], weight: NF4Tensor) -> Float[Array, "*B N"]:
    """y = x · dequantize(W)ᵀ for a packed `W[N, K]`; differentiable in x only.

    What is kept for the backward pass is the packed weight: it is dequantized once more there, so that no 16-bit copy
    outlives the forward pass.
    """
    weight, x = jax.lax.optimization_barrier((weight, x))
    return reference.forward(x, weight)


def _forward(x, weight):
    return nf4_matmul(x, weight), weight


def _backward(weight, dy):
    # Without the barrier XLA sees the same dequantization in both passes and keeps the first one's result.
    weight, dy = jax.lax.optimization_barrier((weight, dy))
    return reference.backward(dy, weight), None


nf4_matmul.defvjp(_forward, _backward)
