"""A comparison as tables for people, at most 110 columns wide."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qlora_jax.report.words import figures, percent, size

WIDTH = 110
COLUMNS = ("method", "rate", "trained", "step's peak", "tokens/s", "held-out loss", "exact match", "gain kept")


def print_tables(result: Mapping[str, Any], file: TextIO) -> None:
    """Writes the rows, and the 7B memory beside them."""
    console = Console(file=file, width=None if file.isatty() else WIDTH, highlight=False)
    console.print(methods_table(result))
    console.print(memory_table(result["memory"]))


def methods_table(result: Mapping[str, Any]) -> Table:
    """A line for each method; in brackets the lowest and the highest of the seeds."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in COLUMNS:
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in result["rows"]:
        peak = size(row["device_peak_bytes"] or row["peak_bytes"] or 0)
        found = figures(row) | {"step's peak": peak, "gain kept": percent(row["gain_kept"])}
        table.add_row(*(found[title] for title in COLUMNS))
    return table


def memory_table(memory: Mapping[str, Any]) -> Table:
    """Weights and whole train step of a 7B model by each method."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{memory['model']}, {memory['tokens']} tokens")
    for title in ("weights alone", f"train step ({memory['how']})", "trained"):
        table.add_column(title, justify="right")
    for row in memory["rows"]:
        trained = f"{row['trainable']:,} ({row['trainable_share']:.2%})"
        table.add_row(f"{row['method']}, {row['dtype']}", size(row["weights_bytes"]), size(row["total_bytes"]), trained)
    return table
