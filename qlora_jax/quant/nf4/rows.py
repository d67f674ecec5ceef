"""Some rows of a packed matrix: what an embedding, or a loss over slices of the vocabulary, reads of it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from qlora_jax.quant.nf4.quantize import decode_scales
from qlora_jax.quant.nf4.tensor import BLOCK, NF4Tensor


def take_rows(tensor: NF4Tensor, index: Int[Array, " M"]) -> NF4Tensor:
    """The rows at `index`, as a tensor `[M, K]` whose scales are decoded already (float32).

    Raises:
      ValueError: blocks cross the rows, as K is no multiple of 64.
    """
    check_rows(tensor.shape, "taking rows")
    return _part(tensor, tensor.codes[index], tensor.absmax[index], index)


def slice_rows(tensor: NF4Tensor, start: int | Int[Array, ""], size: int) -> NF4Tensor:
    """`size` rows from `start` on, which may be traced; else as `take_rows`."""
    check_rows(tensor.shape, "taking rows")
    codes, absmax = (lax.dynamic_slice_in_dim(a, start, size) for a in (tensor.codes, tensor.absmax))
    return _part(tensor, codes, absmax, start + jnp.arange(size))


def check_rows(shape: tuple[int, ...], what: str) -> None:
    """Refuses a matrix whose rows are no whole number of blocks. Raises ValueError."""
    if shape[1] % BLOCK:
        raise ValueError(
            f"{what} in NF4 needs rows of a multiple of {BLOCK} elements, this matrix is {tuple(shape)}: "
            f"store it in int8, or as it is (none)"
        )


def _part(tensor: NF4Tensor, codes, absmax, rows) -> NF4Tensor:
    if tensor.double:
        block = rows[:, None] * absmax.shape[1] + jnp.arange(absmax.shape[1])
        absmax = decode_scales(tensor, absmax.reshape(-1), block.reshape(-1)).reshape(absmax.shape)
    shape = (codes.shape[0], tensor.shape[1])
    return NF4Tensor.create(codes, absmax, shape=shape, dtype=tensor.dtype, codebook=tensor.codebook)
