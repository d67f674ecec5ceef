"""Figures of a comparison in words, the same in its table and on its page."""

from collections.abc import Sequence


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


def gigabytes(count: int) -> str:
    """Bytes in GB of 10⁹."""
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:.1f} GB"
