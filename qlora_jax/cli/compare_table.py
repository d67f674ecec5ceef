"""A comparison as tables for people, at most 110 columns wide."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qlora_jax.cli.sizes import size
from qlora_jax.compare.words import percent, range_of, rate

WIDTH = 110


def print_tables(result: Mapping[str, Any], file: TextIO) -> None:
    """Writes the rows, and the 7B memory beside them."""
    console = Console(file=file, width=None if file.isatty() else WIDTH, highlight=False)
    console.print(methods_table(result))
    console.print(memory_table(result["memory"]))


def methods_table(result: Mapping[str, Any]) -> Table:
    """A line for each method; in brackets the lowest and the highest of the seeds."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for title in ("rate", "trained", "step's peak", "tokens/s", "held-out loss", "exact match", "gain kept"):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        spread, speed = row["spread"], row["tokens_per_second"]
        table.add_row(
            row["title"],
            rate(row["learning_rate"]),
            f"{row['trainable']:,}" if row["trainable"] else "-",
            size(row["device_peak_bytes"] or row["peak_bytes"] or 0),
            f"{speed:,.0f}" if speed else "-",
            f"{row['heldout_loss']:.4f}{range_of(spread.get('heldout_loss'), '{:.4f}')}",
            f"{percent(row['exact_match'])}{range_of(spread.get('exact_match'), '{:.1%}')}",
            percent(row["gain_kept"]),
        )
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
