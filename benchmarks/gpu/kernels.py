"""Dequantize and the fused matmul, for the shapes of a 7B model's layers."""

import math

import jax
import jax.numpy as jnp

from benchmarks.gpu import api
from benchmarks.gpu.context import GB, Context, reason
from benchmarks.gpu.fill import packed, random_array
from benchmarks.gpu.names import COPY, dequantize_name, fused_name, separate_name, shape_name
from benchmarks.gpu.timing import Timing, measure

COPY_BAR = (">=", 0.75)
PATIENCE = 20  # seconds that compiling and timing one figure may need


def weight_sets(context: Context, shape: tuple[int, int], extra: int) -> list[list]:
    """Sets of `unroll` packed weights that with `extra` bytes each go through more memory than a cache holds."""
    sizes = context.sizes
    one = math.prod(shape) // 2 + extra
    count = math.ceil(sizes.rotate_bytes / (one * sizes.unroll))
    return [[packed(shape, s * sizes.unroll + i) for i in range(sizes.unroll)] for s in range(count)]


def dequantize_shape(context: Context, shape: tuple[int, int]) -> None:
    """GB/s (packed bytes read, bfloat16 bytes written) of every implementation, beside the copy."""
    written = 2 * math.prod(shape)
    sets = weight_sets(context, shape, written)
    moved = sets[0][0].nbytes + written
    for implementation in api.IMPLEMENTATIONS:
        name, bar = dequantize_name(shape, implementation), COPY_BAR if implementation == "auto" else None
        refused = context.refusal(implementation)
        if refused:
            context.missing(name, "GB/s", refused, bar=bar)
        elif not context.late(name, "GB/s", PATIENCE):
            with api.using(implementation):
                timing = measure(lambda *ws: [api.dequantize(w) for w in ws], sets, context.sizes)
            rate = moved * context.sizes.unroll / timing.seconds / GB
            context.row(name, rate, "GB/s", reference=context.results.value(COPY), bar=bar, note=timing.note)


def launch_floor(context: Context) -> None:
    """Time per kernel of the same program over weights so small that only launching is left."""
    name = "launch floor, per kernel"
    if context.refusal("auto"):
        context.missing(name, "us", context.refusal("auto"))
        return
    weights = [packed((64, 64), i) for i in range(context.sizes.unroll)]
    timing = measure(lambda *ws: [api.dequantize(w) for w in ws], [weights], context.sizes)
    context.row(name, timing.seconds / context.sizes.unroll * 1e6, "us")


def run_dequantize(context: Context) -> None:
    launch_floor(context)
    for shape in (*context.sizes.shapes, context.sizes.merged):
        dequantize_shape(context, shape)


def fused_time(context: Context, x, sets: list[list]) -> Timing:
    """The fused kernel over the matrices of a stack, as the decoder's scan calls it."""
    stacks = [(x, jax.tree.map(lambda *a: jnp.stack(a), *ws)) for ws in sets]
    count = context.sizes.unroll
    return measure(lambda x, stack: [api.fused(x, stack, jnp.int32(i)) for i in range(count)], stacks, context.sizes)


def separate_time(context: Context, x, sets: list[list]) -> Timing:
    """Dequantize, then the library's product."""
    return measure(lambda x, *ws: [x @ api.dequantize(w).T for w in ws], [(x, *ws) for ws in sets], context.sizes)


def fused_row(context: Context, shape: tuple[int, int], rows: int, sets: list[list]) -> float | None:
    """Microseconds of the fused kernel beside dequantize + product; returns how many times faster it is."""
    name = fused_name(shape, rows)
    if context.late(name, "us", PATIENCE):
        return None
    x = random_array(jax.random.key(rows), (rows, shape[1]), jnp.bfloat16)
    apart = separate_time(context, x, sets).seconds / context.sizes.unroll * 1e6
    context.row(separate_name(shape, rows), apart, "us")
    refused = context.refusal("pallas", "fused matmul")
    if refused:
        context.missing(name, "us", refused)
        return None
    try:
        timing = fused_time(context, x, sets)
    except api.NotHere as error:
        context.missing(name, "us", f"not measured: {error}")
        return None
    except Exception as error:  # one tile size that does not compile must not hide the other rows
        context.missing(name, "us", f"failed: {reason(error)}")
        return None
    value = timing.seconds / context.sizes.unroll * 1e6
    context.row(name, value, "us", reference=apart, inverse=True, note=timing.note)
    return apart / value


def crossing(found: dict[int, float | None]) -> int:
    """The most rows up to which the fused kernel is never slower; 0 where it is slower at once."""
    last = 0
    for rows, ratio in sorted(found.items()):
        if ratio is None or ratio < 1:
            break
        last = rows
    return last


def run_fused(context: Context) -> None:
    """The table that sets the dispatch: up to how many rows is the fused kernel the faster one?"""
    context.require("auto")
    for shape in context.sizes.shapes:
        sets = weight_sets(context, shape, 0)
        found = {rows: fused_row(context, shape, rows, sets) for rows in context.sizes.m}
        name = f"fused matmul {shape_name(shape)}: faster up to"
        if any(ratio is not None for ratio in found.values()):
            context.row(name, crossing(found), "rows")
        else:
            context.missing(name, "rows", "not measured: no fused figure")


def run_group(context: Context) -> None:
    """Query, key and value projections in one launch, beside three."""
    context.require("auto")
    shape = context.sizes.shapes[0]
    triples = [ws[i : i + 3] for ws in weight_sets(context, shape, 0) for i in range(0, len(ws) - 2, 3)]
    triples = triples or [[packed(shape, i) for i in range(3)]]
    for rows in (1, 16):
        name = f"query, key and value in one launch {shape_name(shape)}, M={rows}"
        refused = context.refusal("auto", "grouped matmul") or context.refusal("auto", "matmul")
        if refused:
            context.missing(name, "us", refused)
            continue
        x = random_array(jax.random.key(rows), (rows, shape[1]), jnp.bfloat16)
        sets = [(x, *triple) for triple in triples]
        three = measure(lambda x, *ws: [api.matmul(x, w) for w in ws], sets, context.sizes)
        one = measure(lambda x, *ws: api.group(x, list(ws)), sets, context.sizes)
        note = one.note or three.note
        context.row(name, one.seconds * 1e6, "us", reference=three.seconds * 1e6, inverse=True, note=note)
