"""Quantization to NF4 and back, in float32, held bit for bit against bitsandbytes."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nf4.codebook import CODEBOOKS, dynamic_map, thresholds
from qlora_jax.nf4.tensor import BLOCK, NESTED_BLOCK, NF4Tensor, row_layout

SOURCE_DTYPES = ("bfloat16", "float16", "float32")
ZERO_CODE = 7


@functools.partial(jax.jit, static_argnames=("double", "dtype", "codebook"))
def quantize(
    weight: Float[Array, "N K"], *, double: bool = True, dtype: str | None = None, codebook: str = "nf4"
) -> NF4Tensor:
    """Packs one weight matrix.

    Args:
      weight: bfloat16, float16 or float32 `[N, K]`.
      double: quantize the scales a second time (8 bits, blocks of 256, mean subtracted).
      dtype: what `dequantize` shall give; the weight's own dtype where None.
      codebook: a key of `CODEBOOKS`.

    Raises:
      ValueError: not a matrix, an empty one, or another dtype.
    """
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(
            f"quantize takes one non-empty matrix [N, K], got shape {weight.shape}: vmap it over a stack"
        )
    if str(weight.dtype) not in SOURCE_DTYPES:
        raise ValueError(f"quantize takes {', '.join(SOURCE_DTYPES)}, got {weight.dtype}")
    blocks = _in_blocks(weight)
    absmax = jnp.abs(blocks).max(-1)
    codes = _nearest_codes(blocks, absmax, codebook)
    packed = _pack(codes.reshape(codes.shape[0], -1)[:, : row_layout(weight.shape)[1]])
    scales = _quantize_scales(absmax) if double else (absmax,)
    return NF4Tensor.create(
        packed, *scales, shape=weight.shape, dtype=dtype or weight.dtype, codebook=codebook
    )


def dequantize(tensor: NF4Tensor, dtype=None) -> Float[Array, "*L N K"]:
    """The weight `[*L, N, K]` of a packed tensor, rounded once to its own dtype, then cast to `dtype` if given."""
    levels = jnp.asarray(CODEBOOKS[tensor.codebook])
    rows, elements = row_layout(tensor.shape)
    codes = _unpack(tensor.codes)
    padding = -codes.shape[-1] % BLOCK
    if padding:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    blocks = codes.reshape(*tensor.stack, rows, -1, BLOCK)
    # A code is below 16 by construction, so the gather needs no bounds check.
    values = levels.at[blocks].get(mode="promise_in_bounds") * dequantize_scales(tensor)[..., None]
    values = values.astype(tensor.dtype).reshape(*tensor.stack, rows, -1)[..., :elements]
    weight = values.reshape(*tensor.stack, *tensor.shape)
    return weight if dtype is None else weight.astype(dtype)


def dequantize_scales(tensor: NF4Tensor) -> Float[Array, "*L R blocks"]:
    """The float32 scale of every block."""
    if not tensor.double:
        return tensor.absmax
    flat = tensor.absmax.reshape(*tensor.stack, -1)
    group = jnp.arange(flat.shape[-1]) // NESTED_BLOCK
    index = flat.astype(jnp.int32)
    level = jnp.take_along_axis(tensor.nested_levels, index, axis=-1, mode="promise_in_bounds")
    scale = _rounded(level * tensor.nested_absmax[..., group]) + tensor.offset[..., None]
    return scale.reshape(tensor.absmax.shape)


def _rounded(product: Array) -> Array:
    """Keeps a compiler from contracting `product + y` into a fused multiply-add, which rounds once instead of twice.

    XLA drops reduce_precision and optimization_barrier too early to prevent it; an operation that changes only -inf
    stays between the two.
    """
    return jnp.maximum(product, jnp.finfo(product.dtype).min)


def _in_blocks(weight: Array) -> Array:
    """float32 `[R, blocks, 64]`; a last partial block is filled with zeros, which change no scale."""
    rows, elements = row_layout(weight.shape)
    flat = weight.reshape(rows, elements)
    flat = jnp.pad(flat, ((0, 0), (0, -elements % BLOCK)))
    return flat.reshape(rows, -1, BLOCK).astype(jnp.float32)


def _nearest_codes(blocks: Array, absmax: Array, codebook: str) -> Array:
    """uint8 codes; a value on a threshold takes the lower one.

    Counting thresholds needs one byte an element; an argmin over 16 distances would need 64.
    """
    # A block of zeros must not divide by zero: its codes are those of 0.
    inverse = jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)
    scaled = jnp.clip(blocks * inverse[..., None], -1, 1)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for threshold in thresholds(CODEBOOKS[codebook]):
        codes += (scaled > threshold).astype(jnp.uint8)
    return codes


def _pack(codes: Array) -> Array:
    """uint8 `[R, E]` codes to `[R, ceil(E/2)]` bytes."""
    codes = jnp.pad(codes, ((0, 0), (0, codes.shape[-1] % 2)), constant_values=ZERO_CODE)
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def _unpack(packed: Array) -> Array:
    """uint8 `[..., bytes]` to uint8 codes `[..., 2 * bytes]`; a shift by (4, 0) fuses where a stack does not."""
    shifts = jnp.array([4, 0], jnp.uint8)
    return ((packed[..., None] >> shifts) & 0xF).reshape(*packed.shape[:-1], -1)


def _quantize_scales(absmax: Array) -> tuple[Array, Array, Array, Array]:
    """(uint8 scales, nested_absmax, nested_levels, offset) of the float32 scales `[R, blocks]`."""
    offset = absmax.mean()
    centred = (absmax - offset).reshape(-1)
    grouped = jnp.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested_absmax = jnp.abs(grouped).max(-1)
    inverse = jnp.where(nested_absmax > 0, 1 / jnp.where(nested_absmax > 0, nested_absmax, 1), 0)
    levels = dynamic_map()
    index = jnp.searchsorted(jnp.asarray(thresholds(levels)), grouped * inverse[:, None])
    index = jnp.where(nested_absmax[:, None] > 0, index, 0)  # equal scales: any code decodes right; theirs is 0
    codes = index.reshape(-1)[: centred.size].reshape(absmax.shape).astype(jnp.uint8)
    return codes, nested_absmax, jnp.asarray(levels), offset
