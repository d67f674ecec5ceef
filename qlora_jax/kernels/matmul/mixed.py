"""The matmul with a projection that is packed in some layers only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_transposed
from qlora_jax.quant.mixed import MixedLayer
from qlora_jax.quant.nf4 import NF4Layer


@jax.custom_vjp
def mixed_matmul(x: Float[Array, "*B K"], layer: MixedLayer) -> Float[Array, "*B N"]:
    """y = x · Wᵀ in the dtype of x, by the layer's own kind of storage; differentiable in x only.

    The derivative is written out: JAX would hand both kinds' operands, whole stacks, from one pass to the other.
    """
    return _by_storage(x, layer, nf4_matmul, "...K,NK->...N")


def _forward(x, layer: MixedLayer):
    return mixed_matmul(x, layer), layer


def _backward(layer: MixedLayer, dy):
    return mixed_matmul_transposed(dy, layer), None


def mixed_matmul_transposed(dy: Float[Array, "*B N"], layer: MixedLayer) -> Float[Array, "*B K"]:
    """dx = dy · W: what the derivative of `mixed_matmul` computes."""
    return _by_storage(dy, layer, nf4_matmul_transposed, "...N,NK->...K")


mixed_matmul.defvjp(_forward, _backward)


def _by_storage(x, layer: MixedLayer, packed: Callable, plain: str):
    stack, index = layer
    place = jnp.asarray(stack.places, jnp.int32)[index]

    def from_plain():
        weight = lax.dynamic_index_in_dim(stack.plain, -1 - place, 0, keepdims=False)
        return jnp.einsum(plain, x, weight.astype(x.dtype))

    return lax.cond(place >= 0, lambda: packed(x, NF4Layer(stack.packed, place)), from_plain)
