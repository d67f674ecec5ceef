"""An NF4 layer's arrays as the kernels take them: flat along the matrix, one leading axis for the stack."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt8

from qlora_jax.quant.nf4 import CODEBOOKS, NF4Layer
from qlora_jax.quant.nf4.dequantize import rounded
from qlora_jax.quant.nf4.layout import NESTED_BLOCK

# Pallas computes offsets in signed 32-bit elements up to arrays of 2**32 bytes, and in 64 bits above.
WRONG_OFFSETS = range(2**31, 2**32 + 1)


class Operands(NamedTuple):
    """What a kernel reads of a layer. Whole arrays: programs find their part by themselves.

    Attributes:
      codes: two codes a byte. absmax: the scale of every block of 64, 8-bit codes with double quantization.
      nested_absmax, nested_levels, offset: what decodes them; absent without double quantization.
      levels: the 16 values of a code. layer: int32 `[1]`.
    """

    codes: UInt8[Array, "L bytes"]
    absmax: UInt8[Array, "L blocks"] | Float[Array, "L blocks"]
    nested_absmax: Float[Array, "L groups"] | None
    nested_levels: Float[Array, "L 256"] | None
    offset: Float[Array, " L"] | None
    levels: Float[Array, " 16"]
    layer: Int[Array, " 1"]


def operands(layer: NF4Layer) -> Operands:
    """The arrays of a layer, reshaped without a copy."""
    stack, index = _within_reach(layer)
    nested = (None, None, None)
    if stack.double:
        nested = (stack.nested_absmax, stack.nested_levels, stack.offset)
    return Operands(
        stack.codes.reshape(stack.codes.shape[0], -1),
        stack.absmax.reshape(stack.absmax.shape[0], -1),
        *nested,
        levels=jnp.asarray(CODEBOOKS[stack.codebook]),
        layer=jnp.reshape(index, 1).astype(jnp.int32),
    )


def _within_reach(layer: NF4Layer) -> NF4Layer:
    """The layer, sliced out of its stack where the kernel's offsets into the whole would overflow."""
    if layer.stack.codes.size in WRONG_OFFSETS:
        return NF4Layer.of(layer.take())
    return layer


def whole(array) -> pl.BlockSpec:
    """The block specification of an array that every program sees whole."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def scales(refs: Any, blocks: Int[Array, " n"], layer) -> Float[Array, " n"]:
    """Inside a kernel, of its references to Operands: the float32 scales of blocks, bit for bit the reference's."""
    stored = refs.absmax.at[layer, blocks][...]
    if refs.offset is None:
        return stored
    level = refs.nested_levels.at[layer, stored.astype(jnp.int32)][...]
    group = jax.lax.shift_right_logical(blocks, np.int32(NESTED_BLOCK.bit_length() - 1))
    return rounded(level * refs.nested_absmax.at[layer, group][...]) + refs.offset[layer]
