"""Quantization to NF4, in float32, held bit for bit against bitsandbytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qlora_jax.quant.nf4.codebook import CODEBOOKS, dynamic_map, thresholds
from qlora_jax.quant.nf4.dequantize import rounded
from qlora_jax.quant.nf4.layout import BLOCK, NESTED_BLOCK, row_layout
from qlora_jax.quant.nf4.tensor import NF4Tensor
from qlora_jax.quant.source import check_source

ZERO_CODE = 7
# What bitsandbytes stores as the scale of a partial block of zeros.
ZERO_BLOCK_SCALE = np.float32(1e-38)
TINY = np.finfo(np.float32).tiny  # below it, XLA's arithmetic takes a number for 0


@functools.partial(jax.jit, static_argnames=("double", "dtype", "codebook"))
def quantize(weight: Array, *, double: bool = True, dtype: str | None = None, codebook: str = "nf4") -> NF4Tensor:
    """Packs one weight matrix.

    Args:
      weight: bfloat16, float16 or float32 `[N, K]`.
      double: quantize the scales a second time (8 bits, blocks of 256, mean subtracted).
      dtype: what `dequantize` shall give; the weight's own dtype where None.
      codebook: a key of `CODEBOOKS`.

    Raises:
      ValueError: not a matrix, an empty one, or another dtype.
    """
    check_source(weight)
    blocks = _in_blocks(weight)
    absmax = jnp.abs(blocks).max(-1)
    scaled = _scaled(blocks, absmax)
    if weight.size % BLOCK:
        # bitsandbytes divides in a partial last block, where it multiplies by the reciprocal in all others.
        absmax = absmax.at[:, -1].set(_without_zeros(absmax[:, -1]))
        scaled = scaled.at[:, -1].set(jnp.where(absmax[:, -1:] >= TINY, blocks[:, -1] / absmax[:, -1:], 0))
    codes = _nearest_codes(jnp.clip(scaled, -1, 1), codebook)
    packed = _pack(codes.reshape(codes.shape[0], -1)[:, : row_layout(weight.shape)[1]])
    scales = _quantize_scales(absmax) if double else (absmax,)
    return NF4Tensor.create(packed, *scales, shape=weight.shape, dtype=dtype or weight.dtype, codebook=codebook)


def _on_lookup_grid(scaled: Array) -> Array:
    """Values in [-1, 1] on the grid of 65,536 points by which bitsandbytes' CPU code looks up the nearest level."""
    half = np.float32(32767.5)
    return jnp.floor(rounded((scaled + 1) * half) + np.float32(0.5)) / half - 1


def _in_blocks(weight: Array) -> Array:
    """float32 `[R, blocks, 64]`; a last partial block is filled with zeros, which change no scale."""
    rows, elements = row_layout(weight.shape)
    flat = weight.reshape(rows, elements)
    flat = jnp.pad(flat, ((0, 0), (0, -elements % BLOCK)))
    return flat.reshape(rows, -1, BLOCK).astype(jnp.float32)


def _without_zeros(absmax: Array) -> Array:
    """Replaces zeros by ZERO_BLOCK_SCALE, by its bits: it is subnormal, and XLA's arithmetic would flush it to 0."""
    bits = jax.lax.bitcast_convert_type(absmax, jnp.uint32)
    bits = jnp.where(bits == 0, ZERO_BLOCK_SCALE.view(np.uint32), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _scaled(blocks: Array, absmax: Array) -> Array:
    """Blocks times the reciprocal of their scale; a block of zeros stays zero."""
    empty = absmax < TINY
    inverse = jnp.where(empty, 0, 1 / jnp.where(empty, 1, absmax))
    return blocks * inverse[..., None]


def _nearest_codes(scaled: Array, codebook: str) -> Array:
    """uint8 codes of values in [-1, 1]; a value on a threshold takes the lower one.

    Counting thresholds needs one byte an element; an argmin over 16 distances would need 64.
    """
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for threshold in thresholds(CODEBOOKS[codebook]):
        codes += (scaled > threshold).astype(jnp.uint8)
    return codes


def _pack(codes: Array) -> Array:
    """uint8 `[R, E]` codes to `[R, ceil(E/2)]` bytes."""
    codes = jnp.pad(codes, ((0, 0), (0, codes.shape[-1] % 2)), constant_values=ZERO_CODE)
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def _quantize_scales(absmax: Array) -> tuple[Array, Array, Array, Array]:
    """(uint8 scales, nested_absmax, nested_levels, offset) of the float32 scales `[R, blocks]`."""
    offset = absmax.mean()
    centred = (absmax - offset).reshape(-1)
    grouped = jnp.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested_absmax = jnp.abs(grouped).max(-1)
    inverse = jnp.where(nested_absmax > 0, 1 / jnp.where(nested_absmax > 0, nested_absmax, 1), 0)
    levels = dynamic_map()
    index = jnp.searchsorted(jnp.asarray(thresholds(levels)), _on_lookup_grid(grouped * inverse[:, None]))
    index = jnp.where(nested_absmax[:, None] > 0, index, 0)  # equal scales: any code decodes right; theirs is 0
    codes = index.reshape(-1)[: centred.size].reshape(absmax.shape).astype(jnp.uint8)
    return codes, nested_absmax, jnp.asarray(levels), offset
