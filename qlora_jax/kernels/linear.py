"""y = x · Wᵀ for a weight in whatever way it is stored: the one place that chooses a matmul by the weight's type."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_group
from qlora_jax.kernels.matmul.int8 import int8_matmul
from qlora_jax.kernels.matmul.mixed import mixed_matmul
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.mixed import MixedLayer
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor

MATMULS: dict[type, Callable[[Array, Any], Array]] = {
    NF4Tensor: nf4_matmul,
    NF4Layer: nf4_matmul,
    Int8Tensor: int8_matmul,
    MixedLayer: mixed_matmul,
}
# Kinds of which several weights of one x share a launch.
GROUPED = (NF4Tensor, NF4Layer)


def matmul(x: Float[Array, "*B K"], weight: Any) -> Float[Array, "*B N"]:
    """x · Wᵀ in the dtype of x for `W[N, K]`, an array or packed; by a packed one nothing is derived."""
    return MATMULS.get(type(weight), _plain)(x, weight)


def matmul_group(x: Float[Array, "*B K"], weights: Sequence[Any]) -> list[Float[Array, "*B N"]]:
    """`matmul` of one x with several weights, such as those of queries, keys and values."""
    if all(isinstance(weight, GROUPED) for weight in weights):
        return nf4_matmul_group(x, weights)
    return [matmul(x, weight) for weight in weights]


def _plain(x, weight):
    return jnp.einsum("...K,NK->...N", x, weight.astype(x.dtype))
