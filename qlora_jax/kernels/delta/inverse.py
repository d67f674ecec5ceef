"""The inverse of many small unit triangular matrices, by matrix products alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qlora_jax.kernels.delta.reference import einsum

matmul = functools.partial(einsum, "...ij,...jk->...ik")


@jax.custom_jvp
def unit_inverse(lower: Float32[Array, "*B C C"]) -> Float32[Array, "*B C C"]:
    """(I + lower)^-1 for strictly lower triangular matrices. What lies on or above the diagonal is not looked at.

    The inverses of the diagonal's blocks of one size give those of twice the size: the block below them becomes
    −X·L·X. In hard cases (keys nearly the same, beta 0.999) float32 stays within 3e-7 of the exact inverse. The shorter
    product Π (I + (−L)^(2^i)) does not: its powers reach 10¹⁷ there before they cancel, and no digit is left. Forward
    substitution (`solve_triangular`) is accurate too, but on a GPU it calls cuBLAS, between copies of its operands.
    """
    size = lower.shape[-1]
    inverse = jnp.eye(size, dtype=lower.dtype) - jnp.where(_below(size, 1), lower, 0)
    side = 2
    while side < size:
        below = jnp.where(_below(size, side), lower, 0)
        inverse = inverse - matmul(inverse, matmul(below, inverse))
        side *= 2
    return inverse


@unit_inverse.defjvp
def _derivative(primals, tangents):
    inverse = unit_inverse(*primals)
    tangent = jnp.tril(tangents[0], -1)
    return inverse, -matmul(inverse, matmul(tangent, inverse))


def _below(size: int, side: int) -> np.ndarray:
    """Of each pair of blocks on the diagonal, the block below it: second block's rows, first block's columns."""
    block = np.arange(size) // side
    row, column = block[:, None], block[None, :]
    return (row == column + 1) & (row % 2 == 1)
