"""`report.html`: what a run was, how it went and what it changed, in one file without external resources."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_jax.config import SECTIONS, Config, to_dict
from qlora_jax.report.curves import MAX_POINTS, Series, line_chart, short
from qlora_jax.report.page import BarChart, write_page

PACKAGES = ("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")

# (title, columns of the rows); a chart is left out when no row has its columns.
CHARTS = (
    ("Loss", {"loss": "training", "eval_loss": "evaluation"}),
    ("Exact match", {"exact_match": "evaluation"}),
    ("Learning rate", {"learning_rate": "learning rate"}),
    ("Gradient norm", {"grad_norm": "gradient norm"}),
    ("Tokens per second", {"tokens_per_second": "tokens per second"}),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row answered before and after training; `expected` is the row's own answer, if it has one."""

    prompt: str
    before: str
    after: str
    expected: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A title, the drawing, and per line its style, name and last value."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str, str]]


def write_report(
    run_dir: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    config: Config,
    facts: Mapping[str, str],
    memory: BarChart | None = None,
) -> Path:
    """Write `run_dir/report.html` and return its path.

    `rows` are those of metrics.jsonl; `facts` are shown first, in order, e.g. {"Trainable parameters":
    "4,194,304 (0.06 %)", "Peak memory": "5.1 GiB"}. `memory` sets the run beside other methods. All text is
    escaped.
    """
    return write_page(
        Path(run_dir) / "report.html",
        "run.html",
        title=Path(run_dir).resolve().name,
        facts=facts,
        charts=[chart for title, columns in CHARTS if (chart := make_chart(title, columns, rows))],
        max_points=MAX_POINTS,
        memory=memory,
        samples=samples,
        settings=settings_table(config),
        versions=versions(),
    )


def make_chart(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The chart of the columns that some row has; None if there are none. Null values are left out."""
    series = []
    for column, name in columns.items():
        points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            style = "first" if column == next(iter(columns)) else "second"
            series.append(Series(name=name, style=style, points=points))
    if not series:
        return None
    legend = [(one.style, one.name, short(one.points[-1][1])) for one in series]
    return Chart(title=title, svg=line_chart(series, label=title), legend=legend)


def settings_table(config: Config) -> list[tuple[str, str]]:
    """(field, value) of the whole configuration, as on the command line."""
    pairs = []
    for name, value in to_dict(config).items():
        fields = {f"{name}.{field}": one for field, one in value.items()} if name in SECTIONS else {name: value}
        pairs += [(field, _as_text(one)) for field, one in fields.items()]
    return pairs


def _as_text(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(value) if all(isinstance(one, str) for one in value) else json.dumps(value)


def versions() -> list[tuple[str, str]]:
    """(name, version) of Python and of the packages that the numbers depend on."""
    return [("Python", platform.python_version()), *((name, version_of(name)) for name in PACKAGES)]


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # such as this project itself, run from its source folder
        return "not installed"
