"""Quantization to MXFP4 by the rule of OCP's specification (section 6.3)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.quant.mxfp4.layout import BIAS, BLOCK, LARGEST_EXPONENT, LEVELS, check_blocks
from qlora_jax.quant.mxfp4.tensor import MXFP4Tensor
from qlora_jax.quant.source import check_source


@functools.partial(jax.jit, static_argnames="dtype")
def quantize(weight: Array, *, dtype: str | None = None) -> MXFP4Tensor:
    """A block's scale is 2^(⌊log₂ absmax⌋ - 2); its elements go to the nearest level, a tie to the even code.

    Values beyond 6 · scale become 6 · scale, as the specification has it. What MXFP4 holds exactly comes back exactly.
    A block with an infinity or a NaN gets the scale that is no number; a subnormal float32 counts as 0.

    Args:
      weight: bfloat16, float16 or float32 `[N, K]`, K a multiple of 32.
      dtype: what `dequantize` shall give; the weight's own dtype where None.

    Raises:
      ValueError: not a matrix, an empty one, another dtype, or another K.
    """
    check_source(weight)
    check_blocks(weight.shape)
    blocks = weight.astype(jnp.float32).reshape(weight.shape[0], -1, BLOCK)
    largest = jnp.abs(blocks).max(-1)
    # The exponent of a float32 is in its bits; a subnormal one's counts as the smallest.
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) & 0xFF
    scales = jnp.where(exponent == 255, 255, jnp.maximum(exponent - LARGEST_EXPONENT, 0))
    # 2^(127 - scale) by its bits: never subnormal, as the largest exponent of a float32 is 127.
    factor = jax.lax.bitcast_convert_type(jnp.maximum(2 * BIAS - scales, 1) << 23, jnp.float32)
    scaled = blocks * factor[..., None]
    code = _nearest(jnp.abs(scaled)) | (jnp.signbit(blocks).astype(jnp.uint8) << 3)
    pairs = code.reshape(weight.shape[0], -1, 2)
    return MXFP4Tensor.create(
        pairs[..., 0] | (pairs[..., 1] << 4), scales.astype(jnp.uint8), dtype=dtype or weight.dtype
    )


def _nearest(magnitude: Array) -> Array:
    """uint8 codes, without a sign, of the levels nearest to values of at least 0."""
    code = jnp.zeros(magnitude.shape, jnp.uint8)
    for lower in range(len(LEVELS) - 1):
        middle = (LEVELS[lower] + LEVELS[lower + 1]) / 2
        # At the middle the even code of the two.
        code += (magnitude >= middle if lower % 2 else magnitude > middle).astype(jnp.uint8)
    return code
