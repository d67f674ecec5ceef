"""y = x · dequantize(W)ᵀ for few rows of x, fused: a Pallas kernel for Triton, from compute capability 8.0 on.

Reading the packed weights is all the time there is, so they are decoded in registers on their way into the tensor
cores. A level is rounded to the dtype of x, the scale of its block stays float32 and multiplies the block's sum:
rounding differs from the reference, which rounds level · scale, but is no larger.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from qlora_jax.kernels.matmul.decode import decode, decode_plain, divergent, fma, registers
from qlora_jax.kernels.operands import operands, scales, whole
from qlora_jax.kernels.tiles import MatmulTiles
from qlora_jax.quant.nf4 import CODEBOOKS, NF4Layer
from qlora_jax.quant.nf4.layout import BLOCK

NAME = "nf4_matmul"
DTYPES = ("bfloat16", "float16")


def fits(layers: Sequence[NF4Layer], dtype, tiles: MatmulTiles) -> bool:
    """Whether the kernel has a form for weights of these shapes and x of this dtype."""
    rows_whole = all(layer.shape[1] % BLOCK == 0 and layer.shape[0] >= tiles.rows for layer in layers)
    same = {(layer.shape[1], layer.stack.codebook) for layer in layers}
    return rows_whole and len(same) == 1 and str(dtype) in DTYPES


def matmul(
    x: Float[Array, "M K"], layers: Sequence[NF4Layer], tiles: MatmulTiles, *, interpret: bool = False
) -> list[Float[Array, "M N"]]:
    """x · dequantize(W)ᵀ for each of several weights of the same K, in one launch; M at most `tiles.tokens`."""
    blocks = layers[0].shape[1] // BLOCK
    turns = blocks // math.gcd(blocks, tiles.blocks)
    outputs_in_tiles = sum(pl.cdiv(layer.shape[0], tiles.rows) for layer in layers)
    split = tiles.split(outputs_in_tiles, blocks, len(x))
    codebook = CODEBOOKS[layers[0].stack.codebook]
    arrays = (x, jnp.asarray(registers(codebook, x.dtype)), *map(operands, layers))
    outputs = [jax.ShapeDtypeStruct((split, len(x), layer.shape[0]), jnp.float32) for layer in layers]
    kernel = functools.partial(
        _kernel, tiles=tiles, turns=turns, split=split, blocks=blocks, codebook=codebook, interpret=interpret
    )
    partial = pl.pallas_call(
        kernel,
        grid=(outputs_in_tiles, split),
        in_specs=list(jax.tree.map(whole, arrays)),
        out_specs=[whole(out) for out in outputs],
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=NAME,
    )(*arrays)
    return [sums.sum(0).astype(x.dtype) for sums in partial]


def _kernel(x_ref, register_ref, *refs, tiles: MatmulTiles, turns, split, blocks, codebook, interpret):
    weights, outputs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    part, first = pl.program_id(1), 0
    per_part = pl.cdiv(turns, split)
    turn_range = part * per_part, jnp.minimum((part + 1) * per_part, turns)
    constants = [] if interpret else [divergent(register_ref[i]) for i in range(register_ref.shape[0])]

    def decoded(codes, levels_ref):
        return (
            decode_plain(codes, levels_ref, x_ref.dtype)
            if interpret
            else decode(codes, constants, codebook, x_ref.dtype)
        )

    add_scaled = _add_scaled if interpret else fma
    for operand, out_ref in zip(weights, outputs, strict=True):
        program = functools.partial(
            _program, x_ref, operand, out_ref, tiles, turn_range, blocks, blocks // turns, decoded, add_scaled
        )
        tile = pl.program_id(0) - first
        count = pl.cdiv(out_ref.shape[2], tiles.rows)
        if len(weights) == 1:
            program(tile, part)
        else:
            pl.when((tile >= 0) & (tile < count))(functools.partial(program, tile, part))
        first += count


def _program(x_ref, refs: Any, out_ref, tiles, turn_range, blocks, per_turn, decoded, add_scaled, tile, part):
    """One tile of rows of W, over one part of K."""
    layer, packed = refs.layer[0], BLOCK // 2
    first_turn, end_turn = turn_range
    # The last tile is moved back to end with the matrix: some rows are computed twice, to the same values.
    start = jnp.minimum(tile * tiles.rows, out_ref.shape[2] - tiles.rows)
    rows = start + jnp.arange(tiles.rows)
    # Rows of x beyond its last are read as its last; nothing of them is stored.
    tokens = jnp.arange(tiles.tokens)
    token = jnp.minimum(tokens, x_ref.shape[0] - 1)

    def one_block(block, sums):
        first_byte = rows[:, None] * (blocks * packed) + (block * packed + jnp.arange(packed))[None, :]
        w = decoded(refs.codes.at[layer, first_byte][...], refs.levels)
        xs = x_ref.at[token, pl.ds(block * BLOCK, BLOCK)][...]
        products = lax.dot_general(w, xs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scale = scales(refs, rows * blocks + block, layer)
        return add_scaled(products, scale[:, None], sums)

    def turn(index, sums):
        for i in range(per_turn):
            sums = one_block(index * per_turn + i, sums)
        return sums

    sums = lax.fori_loop(first_turn, end_turn, turn, jnp.zeros((tiles.rows, tiles.tokens), jnp.float32))
    stored = jnp.broadcast_to((tokens < x_ref.shape[0])[None, :], sums.shape)
    plt.store(out_ref.at[part, tokens[None, :], rows[:, None]], sums, mask=stored)


def _add_scaled(products, scale, sums):
    return products * scale + sums
