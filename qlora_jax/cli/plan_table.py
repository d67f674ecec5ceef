"""A plan as a table for people, at most 100 columns wide."""

from pathlib import Path
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qlora_jax.memory.advice import MOST_ROWS
from qlora_jax.report.methods import SHORT_TITLES
from qlora_jax.report.words import size
from qlora_jax.run.plan import CONTEXT, METHODS, Report

WIDTH = 100
# The parts that add up to the peak, in words.
PARTS = {
    "codes": "packed weights: codes",
    "scales": "packed weights: scales",
    "weights": "projections in 16 or 32 bits",
    "embeddings": "embedding and output layer",
    "norms": "norms",
    "adapters": "adapters",
    "optimizer": "optimizer state",
    "batch": "tokens of one step",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "largest_temporary": "largest temporary: the larger of",
}
# They do not come at the same time.
TEMPORARIES = {
    "layer": "  one layer's backward pass",
    "logits": "  the loss and one chunk's logits",
}


def print_report(report: Report, config_file: str, file: TextIO) -> None:
    """Writes the breakdown of all methods, the verdict on the chosen one, and what to change."""
    # A pipe has no width of its own; rich would take 80 columns.
    console = Console(file=file, width=None if file.isatty() else WIDTH, highlight=False)
    console.width = min(console.width, WIDTH)
    section = report.config.train
    console.print(
        f"{config_file} on {report.card.name}: {report.config.method}, {Path(report.config.model.geometry).stem}, "
        f"{section.batch_size} x {section.seq_len} tokens in {report.config.model.dtype}"
    )
    console.print(breakdown_table(report))
    for line in verdict(report):
        console.print(line)
    if report.changes:
        console.print(changes_table(report))


def breakdown_table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("bytes on the device")
    for method in METHODS:
        mark = " (chosen)" if method == report.config.method else ""
        table.add_column(SHORT_TITLES[method] + mark, justify="right")
    parts = {method: one.parts() for method, one in report.breakdowns.items()}
    for name, words in PARTS.items():
        table.add_row(words, *(size(parts[method][name]) for method in METHODS))
    ones = [report.breakdowns[method] for method in METHODS]
    for name, words in TEMPORARIES.items():
        table.add_row(words, *(f"({size(getattr(one, name))})" for one in ones), style="dim")
    table.add_section()
    table.add_row("peak by arithmetic", *(size(one.peak) for one in ones))
    peaks = [report.compiled if method == report.config.method else None for method in METHODS]
    table.add_row("peak by XLA's compiler", *("" if peak is None else size(peak) for peak in peaks))
    table.add_row(f"with {size(CONTEXT)} for the CUDA context", *(word(report, peak) for peak in best(report)))
    return table


def best(report: Report) -> list[int]:
    """Each method's peak: the compiler's where there is one."""
    return [report.peak if m == report.config.method else report.breakdowns[m].peak for m in METHODS]


def verdict(report: Report) -> list[str]:
    """What the plan comes to, in sentences."""
    section, need = report.config.train, report.peak + CONTEXT
    room = report.card.capacity - need
    rest = f"{size(room)} to spare" if room >= 0 else f"{size(-room)} too much"
    host = report.breakdown.host
    return [
        f"{word(report, report.peak).capitalize()}: {size(need)} of {size(report.card.capacity)}, {rest}.",
        *([f"In the host's memory: {size(host)} of activations, optimizer state and embedding."] if host else []),
        f"Peak: {report.how}; other methods: arithmetic.",
        f"Largest batch that fits: {_batch(report)} at {section.seq_len} tokens.",
        f"Longest sequence that fits: {_length(report)} at batch {section.batch_size}.",
    ]


def _batch(report: Report) -> str:
    if report.largest_batch == 0:
        return "none"
    return f"{report.largest_batch}{' or more' if report.largest_batch == MOST_ROWS else ''}"


def _length(report: Report) -> str:
    limit = report.config.model.max_position or report.model_config.max_position
    if report.longest_sequence == 0:
        return "none"
    return f"{report.longest_sequence} tokens{' (all the model has)' if report.longest_sequence == limit else ''}"


def changes_table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("change first" if not report.fits(report.peak) else "to save memory")
    table.add_column("saves alone", justify="right")
    table.add_column("with those above", justify="right")
    for change in report.changes:
        overrides = " ".join(f"--config.{override}" for override in change.overrides)
        peak = report.scaled(change.peak_together)
        table.add_row(overrides, size(change.saves), f"{size(peak)}, {word(report, peak)}")
    return table


def word(report: Report, peak: int) -> str:
    return "fits" if report.fits(peak) else "does not fit"
