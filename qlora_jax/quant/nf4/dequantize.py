"""Numerics of dequantization, in float32. `tensor` is an NF4Tensor throughout."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qlora_jax.quant.nf4.codebook import CODEBOOKS
from qlora_jax.quant.nf4.layout import BLOCK, NESTED_BLOCK, row_layout


def dequantize(tensor: Any, dtype=None) -> Float[Array, "*L N K"]:
    """The weight `[*L, N, K]` of a packed tensor, rounded once to its own dtype, then cast to `dtype` if given."""
    tensor = jax.tree.map(jnp.asarray, tensor)  # one that was just read from a file holds NumPy arrays
    levels = jnp.asarray(CODEBOOKS[tensor.codebook])
    rows, elements = row_layout(tensor.shape)
    codes = _unpack(tensor.codes)
    padding = -codes.shape[-1] % BLOCK
    if padding:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    blocks = codes.reshape(*tensor.leading, rows, -1, BLOCK)
    # A code is below 16 by construction, so the gather needs no bounds check.
    values = levels.at[blocks].get(mode="promise_in_bounds") * dequantize_scales(tensor)[..., None]
    values = values.astype(tensor.dtype).reshape(*tensor.leading, rows, -1)[..., :elements]
    weight = values.reshape(*tensor.leading, *tensor.shape)
    return weight if dtype is None else weight.astype(dtype)


def dequantize_scales(tensor: Any) -> Float[Array, "*L R blocks"]:
    """The float32 scale of every block."""
    if not tensor.double:
        return tensor.absmax
    flat = tensor.absmax.reshape(*tensor.leading, -1)
    return decode_scales(tensor, flat, jnp.arange(flat.shape[-1])).reshape(tensor.absmax.shape)


def decode_scales(tensor: Any, stored: UInt8[Array, "*L n"], block: Int[Array, " n"]) -> Float[Array, "*L n"]:
    """The float32 scales of some blocks of a tensor with double quantization, from what is `stored` for them."""
    index = stored.astype(jnp.int32)
    level = jnp.take_along_axis(tensor.nested_levels, index, axis=-1, mode="promise_in_bounds")
    return rounded(level * tensor.nested_absmax[..., block // NESTED_BLOCK]) + tensor.offset[..., None]


def rounded(product: Array) -> Array:
    """Keeps a compiler from contracting `product + y` into a fused multiply-add, which rounds once instead of twice.

    XLA drops reduce_precision and optimization_barrier too early to prevent it; an operation that changes only -inf
    stays between the two.
    """
    return jnp.maximum(product, jnp.finfo(product.dtype).min)


def _unpack(packed: Array) -> Array:
    """uint8 `[..., bytes]` to uint8 codes `[..., 2 * bytes]`; a shift by (4, 0) fuses where a stack does not."""
    shifts = jnp.array([4, 0], jnp.uint8)
    return ((packed[..., None] >> shifts) & 0xF).reshape(*packed.shape[:-1], -1)
