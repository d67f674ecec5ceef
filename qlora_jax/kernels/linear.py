"""y = x · Wᵀ for a weight in whatever way it is stored: the one place that chooses a matmul by the weight's type."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.kernels.matmul.dispatch import nf4_matmul, nf4_matmul_group, nf4_matmul_transposed
from qlora_jax.kernels.matmul.mixed import mixed_matmul, mixed_matmul_transposed
from qlora_jax.kernels.matmul.packed import packed_matmul, packed_matmul_transposed
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.mixed import MixedLayer
from qlora_jax.quant.mxfp4 import MXFP4Tensor
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor
from qlora_jax.quant.packed import PackedMatrix


class Matmul(NamedTuple):
    """y = x · Wᵀ of a kind of weight, and dx = dy · W, which is its derivative."""

    forward: Callable[[Array, Any], Array]
    transposed: Callable[[Array, Any], Array]


NF4, PACKED = Matmul(nf4_matmul, nf4_matmul_transposed), Matmul(packed_matmul, packed_matmul_transposed)
MATMULS: dict[type, Matmul] = {
    NF4Tensor: NF4,
    NF4Layer: NF4,
    Int8Tensor: PACKED,
    MXFP4Tensor: PACKED,
    PackedMatrix: PACKED,
    MixedLayer: Matmul(mixed_matmul, mixed_matmul_transposed),
}
# Kinds of which several weights of one x share a launch.
GROUPED = (NF4Tensor, NF4Layer)


def matmul(x: Float[Array, "*B K"], weight: Any) -> Float[Array, "*B N"]:
    """x · Wᵀ in the dtype of x for `W[N, K]`, an array or packed; by a packed one nothing is derived."""
    return MATMULS.get(type(weight), PLAIN).forward(x, weight)


def matmul_transposed(dy: Float[Array, "*B N"], weight: Any) -> Float[Array, "*B K"]:
    """dy · W in the dtype of dy, for weights as `matmul` has them."""
    return MATMULS.get(type(weight), PLAIN).transposed(dy, weight)


def matmul_group(x: Float[Array, "*B K"], weights: Sequence[Any]) -> list[Float[Array, "*B N"]]:
    """`matmul` of one x with several weights, such as those of queries, keys and values."""
    if all(isinstance(weight, GROUPED) for weight in weights):
        return nf4_matmul_group(x, weights)
    return [matmul(x, weight) for weight in weights]


def _plain(x, weight):
    return jnp.einsum("...K,NK->...N", x, weight.astype(x.dtype))


def _plain_transposed(dy, weight):
    return jnp.einsum("...N,NK->...K", dy, weight.astype(dy.dtype))


PLAIN = Matmul(_plain, _plain_transposed)
