"""Rows that hold one measurement against others of the same file. A missing figure makes a row that says so."""

from typing import Any, NamedTuple

from benchmarks.gpu import names
from benchmarks.gpu.results import COMPARE, Bar, Results, make_row
from benchmarks.gpu.sizes import Sizes


class Comparison(NamedTuple):
    """`ours` against the best of `theirs`, rows of unit `unit`; with `inverse` less is better."""

    name: str
    ours: str
    theirs: tuple[str, ...]
    unit: str
    bar: Bar | None = None
    inverse: bool = False


def comparisons(sizes: Sizes) -> list[Comparison]:
    """Every comparison of the suite."""
    qlora = names.train_name(names.QLORA)
    found = [
        Comparison(
            f"dequantize {names.shape_name(shape)} against bitsandbytes",
            names.dequantize_name(shape, "auto"),
            (names.peer_dequantize_name(shape),),
            "GB/s",
            (">=", 1.15),
        )
        for shape in (*sizes.shapes, sizes.merged)
    ]
    found += [
        Comparison(
            f"matmul of one row {names.shape_name(shape)} against bitsandbytes",
            names.fused_name(shape, 1),
            (names.peer_gemv_name(shape),),
            "us",
            inverse=True,
        )
        for shape in sizes.shapes
    ]
    peers = tuple(map(names.peer_train_name, names.TRAINING))
    lora = names.train_name(names.LORA)
    found.append(Comparison("train step against the best peer", qlora, peers, "tokens/s", (">=", 2.0)))
    found.append(Comparison("train step against our bf16 LoRA", qlora, (lora,), "tokens/s", (">=", 0.95)))
    return found + [comparison for batch in sizes.batches for comparison in decoding(batch)]


def decoding(batch: int) -> list[Comparison]:
    """Generation against the peer, with a bar at batch 1, and against bfloat16 weights."""
    ours = names.decode_name(names.NF4, batch)
    peer, plain = names.peer_decode_name(batch), names.decode_name(names.BF16, batch)
    bar = (">=", 10.0) if batch == 1 else None
    return [
        Comparison(f"decode batch {batch} against the peer", ours, (peer,), "tokens/s", bar),
        Comparison(f"decode batch {batch} against bf16 weights", ours, (plain,), "tokens/s"),
    ]


def compared(results: Results, sizes: Sizes) -> list[dict[str, Any]]:
    """The rows of all comparisons of which a side was tried."""
    rows = []
    for item in comparisons(sizes):
        if any(results.row(name) for name in (item.ours, *item.theirs)):
            rows.append(compare(results, item))
    return rows


def compare(results: Results, item: Comparison) -> dict[str, Any]:
    """One comparison's row: no ratio where a side was not measured."""
    value = results.value(item.ours)
    theirs = [found for name in item.theirs if (found := results.value(name)) is not None]
    best = (min if item.inverse else max)(theirs) if theirs else None
    note = None
    if value is None:
        note = f"not measured: no figure of {item.ours!r}"
    elif best is None:
        note = f"not judged: no figure of {' or '.join(item.theirs)}"
    return make_row(COMPARE, item.name, value, item.unit, reference=best, inverse=item.inverse, bar=item.bar, note=note)
