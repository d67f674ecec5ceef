"""Products of tiles of rows with one expert each, in whatever way the experts are stored.

`lax.ragged_dot` would want all experts of a layer dequantized, and in jax 0.10 multiplies every row by every expert on
NVIDIA GPUs. Here one expert exists in 16 bits at a time, read by reference from the stack.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.kernels.experts.routing import Routing
from qlora_jax.kernels.linear import matmul, matmul_transposed
from qlora_jax.quant.packed import expert, is_trainable


def expert_matmul(x: Float[Array, "tiles side K"], weight: Any, routing: Routing) -> Float[Array, "tiles side N"]:
    """y = x · W[e]ᵀ of every tile, e being its expert, in the dtype of x; x as `gather` gives it, or made from that.

    Differentiable in x; in the weight too if that is a plain array.

    Args:
      weight: one layer's experts `W[E, N, K]`: Experts, Packed, or an array.
    """
    product = _trained if is_trainable(weight) else _frozen
    return product(x, weight, routing.expert)


@jax.custom_vjp
def _frozen(x, weight, experts):
    return _by_tile(matmul, x, weight, experts)


def _frozen_forward(x, weight, experts):
    # What is kept is the reference: no expert's 16-bit form outlives its turn of the loop.
    return _frozen(x, weight, experts), (weight, experts)


def _frozen_backward(kept, dy):
    return _by_tile(matmul_transposed, dy, *kept), None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


@jax.custom_vjp
def _trained(x, weight, experts):
    return _by_tile(matmul, x, weight, experts)


def _trained_forward(x, weight, experts):
    return _trained(x, weight, experts), (x, weight, experts)


def _trained_backward(kept, dy):
    x, weight, experts = kept
    # Two loops: where the weights are frozen, nobody asks for the second one, and XLA drops it.
    return _by_tile(matmul_transposed, dy, weight, experts), _weight_gradient(x, dy, weight, experts), None


_trained.defvjp(_trained_forward, _trained_backward)


def _by_tile(product, x, weight, experts):
    return lax.map(lambda tile: product(tile[0], expert(weight, tile[1])), (x, experts))


def _weight_gradient(x, dy, weight, experts):
    """dW[e] = Σ dyᵀ · x over the tiles of e, which follow one another: added in float32, written in place."""

    def add(carry, tile):
        total, sums, before = carry
        x, dy, here = tile
        own = jnp.einsum("MN,MK->NK", dy, x, preferred_element_type=jnp.float32)
        sums = jnp.where(here == before, sums, 0) + own
        return (lax.dynamic_update_index_in_dim(total, sums.astype(total.dtype), here, 0), sums, here), None

    start = jnp.zeros_like(weight), jnp.zeros(weight.shape[1:], jnp.float32), jnp.int32(-1)
    return lax.scan(add, start, (x, dy, experts))[0][0]
