"""Numerics of dequantization. Floats are put together from bits, because XLA's arithmetic takes subnormals for 0."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qlora_jax.quant.mxfp4.layout import BIAS, BLOCK, LEVELS, NOT_A_NUMBER

FRACTION_BITS = 23
LEVEL_BITS = LEVELS.view(np.int32)
HIDDEN_ONE, INFINITY, NAN = np.int32(1 << FRACTION_BITS), np.int32(0x7F800000), np.int32(0x7FC00000)


def dequantize(codes: UInt8[Array, "*L N bytes"], scales: UInt8[Array, "*L N blocks"], dtype) -> Float[Array, "*L N K"]:
    """The weight, rounded to `dtype` once: float32 and bfloat16 hold every value but the infinite ones exactly."""
    code = unpack(codes).reshape(*scales.shape, BLOCK).astype(jnp.int32)
    bits = value_bits(code, scales.astype(jnp.int32)[..., None]).reshape(*codes.shape[:-1], -1)
    if jnp.dtype(dtype) == jnp.bfloat16:
        # The upper half is the whole value, subnormals included, which a conversion on the CPU would lose.
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def unpack(packed: UInt8[Array, "*L N bytes"]) -> UInt8[Array, "*L N 2*bytes"]:
    """The codes, of each byte the low half first."""
    shifts = jnp.array([0, 4], jnp.uint8)
    return ((packed[..., None] >> shifts) & 0xF).reshape(*packed.shape[:-1], -1)


def value_bits(code: Array, scale: Array) -> Array:
    """The float32 level[code] · 2^(scale - 127) as int32 bits; of int32 arrays that broadcast."""
    level = jnp.asarray(LEVEL_BITS).at[code & 7].get(mode="promise_in_bounds")
    exponent, fraction = (level >> FRACTION_BITS) + scale - BIAS, level & (HIDDEN_ONE - 1)
    # Below the smallest exponent the hidden one becomes visible, one or two places down.
    below = (HIDDEN_ONE | fraction) >> jnp.clip(1 - exponent, 0, 2)
    bits = jnp.where(exponent > 0, (exponent << FRACTION_BITS) | fraction, below)
    bits = jnp.where(exponent >= NOT_A_NUMBER, INFINITY, bits)
    bits = jnp.where(level == 0, 0, bits) | ((code >> 3) << 31)
    return jnp.where(scale == NOT_A_NUMBER, NAN, bits)
