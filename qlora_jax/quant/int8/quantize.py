"""Quantization to 8 bits, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qlora_jax.quant.int8.tensor import Int8Tensor
from qlora_jax.quant.source import check_source

LARGEST = np.float32(127)  # -128 stays unused, so that a row and its negative have the same codes but for the sign


@functools.partial(jax.jit, static_argnames="dtype")
def quantize(weight: Array, *, dtype: str | None = None) -> Int8Tensor:
    """Each row by its absolute maximum, each element to the nearest code (a tie to the even one). Zeros stay zero.

    Args:
      weight: bfloat16, float16 or float32 `[N, K]`.
      dtype: what `dequantize` shall give; the weight's own dtype where None.

    Raises:
      ValueError: not a matrix, an empty one, or another dtype.
    """
    check_source(weight)
    wide = weight.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / LARGEST
    # A scale that is subnormal counts as 0 in XLA's arithmetic.
    empty = scale < jnp.finfo(jnp.float32).tiny
    scaled = jnp.where(empty[:, None], 0, wide / jnp.where(empty, 1, scale)[:, None])
    codes = jnp.clip(jnp.round(scaled), -LARGEST, LARGEST).astype(jnp.int8)
    return Int8Tensor.create(codes, scale, dtype=dtype or weight.dtype)
