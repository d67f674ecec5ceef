"""Line charts as inline SVG; colours come from the page's style, so they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 12, 40
MAX_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (step, value), by step; `style` is the CSS class of the line."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(series: Sequence[Series], *, label: str) -> str:
    """An SVG of the series over the steps. Long series are averaged down to at most 300 points."""
    drawn = [Series(name=one.name, style=one.style, points=average_down(one.points)) for one in series]
    steps = [step for one in drawn for step, _ in one.points]
    values = [value for one in drawn for _, value in one.points]
    x_ticks, y_ticks = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    x = Axis(low=min(steps), high=max(max(steps), min(steps) + 1), start=LEFT, end=WIDTH - RIGHT)
    y = Axis(low=y_ticks[0], high=y_ticks[-1], start=HEIGHT - BOTTOM, end=TOP)
    lines = [_line(one, x, y) for one in drawn]
    grid = [_y_tick(tick, y) for tick in y_ticks]
    grid += [_x_tick(tick, x) for tick in x_ticks if x.low <= tick <= x.high and tick == round(tick)]
    name = escape(f"{label} over the training steps", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        + "".join(grid + lines)
        + f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text></svg>'
    )


def average_down(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    means = [(_mean([step for step, _ in group]), _mean([value for _, value in group])) for group in groups]
    return means or list(points)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values, at 1, 2 or 5 times a power of ten, that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """`0.4129`, `24,490`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(series: Series, x: Axis, y: Axis) -> str:
    spots = [(x.at(step), y.at(value)) for step, value in series.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
    dots = ""
    if len(spots) <= 40:
        dots = "".join(f'<circle class="{series.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in spots)
    return f'<polyline class="{series.style}" points="{path}"/>{dots}'


def _y_tick(value: float, y: Axis) -> str:
    at = f"{y.at(value):.1f}"
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
    return f'{line}<text class="axis" x="{LEFT - 8}" y="{at}" dy="5" text-anchor="end">{short(value)}</text>'


def _x_tick(value: float, x: Axis) -> str:
    place = f'x="{x.at(value):.1f}" y="{HEIGHT - BOTTOM + 20}"'
    return f'<text class="axis" {place} text-anchor="middle">{value:,.0f}</text>'
