"""Figures in words, the same in every table and on every page."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(value: float | None) -> str:
    """A share; a dash for none."""
    return "-" if value is None else f"{value:.1%}"


def rate(value: float | None) -> str:
    """A learning rate; a dash for none."""
    return "-" if value is None else f"{value:g}"


def range_of(bounds: Sequence[float] | None, form: str) -> str:
    """` [lowest, highest]` of several seeds, nothing where they read the same or there is one."""
    low, high = ("", "") if bounds is None else map(form.format, bounds)
    return "" if low == high else f" [{low}, {high}]"


def size(count: int) -> str:
    """Bytes in GB or, where that would be little, in MB (10⁹ and 10⁶ bytes); a dash for nothing."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count else "-"


def gigabytes(count: int) -> str:
    """Bytes in GB of 10⁹."""
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:.1f} GB"


def figures(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of compare.json by the heads of its tables' columns; each table has its own words for the memory."""
    spread, trained, speed = row["spread"], row["trainable"], row["tokens_per_second"]
    return {
        "method": row["title"],
        "rate": rate(row["learning_rate"]),
        "trained": f"{trained:,}" if trained else "-",
        "tokens/s": f"{speed:,.0f}" if speed else "-",
        "held-out loss": f"{row['heldout_loss']:.4f}{range_of(spread.get('heldout_loss'), '{:.4f}')}",
        "exact match": f"{percent(row['exact_match'])}{range_of(spread.get('exact_match'), '{:.1%}')}",
        "gain kept": f"{percent(row['gain_kept'])}{range_of(spread.get('gain_kept'), '{:.1%}')}",
    }
