"""Dequantization as a Pallas kernel for Triton, from compute capability 8.0 on."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from qlora_jax.kernels.operands import operands, scales, whole
from qlora_jax.kernels.tiles import DequantizeTiles
from qlora_jax.quant.nf4 import NF4Layer
from qlora_jax.quant.nf4.layout import BLOCK

NAME = "nf4_dequantize"


def dequantize(layer: NF4Layer, dtype, tiles: DequantizeTiles, *, interpret: bool = False) -> Float[Array, "N K"]:
    """The weight, bit for bit the reference's.

    The packed arrays run on from row to row, so the matrix is taken as one line of N·K weights, cut into tiles
    whatever N and K are.
    """
    stack = layer.stack
    size = math.prod(stack.shape)
    arrays = operands(layer)
    specs = jax.tree.map(whole, arrays)
    kernel = functools.partial(_kernel, size=size, elements=tiles.elements, rounded_to=stack.dtype)
    flat = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(size, tiles.elements),),
        in_specs=[specs],
        out_specs=pl.BlockSpec((size,), lambda i: (0,)),
        out_shape=jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(arrays)
    return flat.reshape(stack.shape)


def _kernel(refs: Any, out_ref, *, size: int, elements: int, rounded_to: str):
    tile, layer = pl.program_id(0), refs.layer[0]
    blocks, packed = elements // BLOCK, elements // 2
    # Only a matrix that is no multiple of the tile has a last one to guard.
    ragged = size % elements > 0

    def valid(count: int, per: int):
        return tile * count + jnp.arange(count) < pl.cdiv(size, per) if ragged else None

    block = tile * blocks + jnp.arange(blocks)
    if ragged:
        block = jnp.minimum(block, pl.cdiv(size, BLOCK) - 1)
    scale = scales(refs, block, layer)
    codes = plt.load(
        refs.codes.at[layer, pl.ds(tile * packed, packed)], mask=valid(packed, 2), other=0 if ragged else None
    )
    codes = codes.astype(jnp.int32)
    values = jnp.stack([refs.levels.at[codes >> 4][...], refs.levels.at[codes & 0xF][...]], axis=-1)
    weights = values.reshape(blocks, BLOCK) * scale[:, None]
    weights = weights.astype(rounded_to).astype(out_ref.dtype).reshape(elements)
    plt.store(out_ref.at[pl.ds(tile * elements, elements)], weights, mask=valid(elements, 1))
