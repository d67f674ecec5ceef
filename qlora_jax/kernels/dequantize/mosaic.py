"""Dequantization as a Pallas kernel for Mosaic GPU: what JAX names as the successor of its Triton backend.

Mosaic has no gather, so a level is found by a tree of selections, and the scales, a 64th of the weights, are decoded by
XLA beforehand. Slower than the Triton kernel by its instruction count; kept ready behind the same tests.
"""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt32

from qlora_jax.quant.nf4 import CODEBOOKS, NF4Layer
from qlora_jax.quant.nf4.dequantize import dequantize_scales
from qlora_jax.quant.nf4.layout import BLOCK

# Blocks of one program: the rows of a warpgroup's accumulator layout, in which a row's scale is broadcast for free.
ROWS = 64


def dequantize(layer: NF4Layer, dtype, *, interpret: Any = None) -> Float[Array, "N K"]:
    """The weight, bit for bit the reference's. `interpret`: parameters of Pallas' interpreter for GPUs."""
    tensor = layer.take()
    size, dtype = math.prod(tensor.shape), jnp.dtype(dtype)
    scales = _filled(dequantize_scales(tensor).reshape(-1), ROWS)
    codes = _filled(tensor.codes.reshape(-1), ROWS * BLOCK // 2).reshape(-1, BLOCK // 2)
    levels = tuple(map(float, CODEBOOKS[tensor.codebook]))
    paired = dtype.itemsize == 2
    out = jax.ShapeDtypeStruct(codes.shape, jnp.uint32 if paired else dtype)

    def nf4_dequantize(codes_ref, scales_ref, *outputs):  # the function's name is the kernel's
        rows = pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        halves = _weights(codes_ref.at[rows], scales_ref.at[rows], levels, tensor.dtype)
        halves = [half.astype(dtype) for half in halves]
        for ref, half in zip(outputs, [_pair(*halves)] if paired else halves, strict=True):
            ref[rows] = half

    outputs = plgpu.kernel(
        nf4_dequantize,
        out_type=[out] if paired else [out, out],
        grid=(codes.shape[0] // ROWS,),
        grid_names=("tile",),
        interpret=interpret,
    )(codes, scales)
    weights = lax.bitcast_convert_type(outputs[0], dtype) if paired else jnp.stack(outputs, axis=-1)
    return weights.reshape(-1)[:size].reshape(tensor.shape)


def _filled(array: Array, multiple: int) -> Array:
    """A flat array with zeros behind it, up to a multiple: Mosaic's loads have no mask."""
    return jnp.pad(array, (0, -array.size % multiple))


def _weights(codes_ref, scales_ref, levels: tuple[float, ...], dtype: str) -> list[Float[Array, "rows bytes"]]:
    """One tile: the weights of the high nibbles and those of the low ones."""
    codes = _load(codes_ref, plgpu.Layout.WGMMA).astype(jnp.int32)
    scale = lax.broadcast_in_dim(_load(scales_ref, plgpu.Layout.WGMMA.reduce(1)), codes.shape, (0,))
    return [(_level(code, levels) * scale).astype(dtype) for code in (codes >> 4, codes & 0xF)]


def _pair(first: Float[Array, "rows bytes"], second: Float[Array, "rows bytes"]) -> UInt32[Array, "rows bytes"]:
    """Two 16-bit floats in a word, the first one below: half as many stores, and each fills whole sectors."""
    low, high = (lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (first, second))
    return low | (high << 16)


def _load(ref, layout):
    """A load from global memory into registers. Before jax 0.11 an index is required beside the reference."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    required = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if required else []), layout=layout, optimized=False)


def _level(code, levels):
    """The level of each code: four rounds of selection by a bit."""
    for bit in range(4):
        chosen = (code & (1 << bit)) != 0
        levels = [jnp.where(chosen, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]
