"""The result file: rows by name, written after each of them, and parts of several runs merged into one file."""

import json
import math
import os
from pathlib import Path
from typing import Any

FIELDS = ("part", "job", "name", "value", "unit", "reference", "ratio", "bar", "passed")
COMPARE = "compare"

# A bar is what a ratio is held to: (">=", 0.75), ("<=", 1.0), or ("within", 0.05) of 1.
Bar = tuple[str, float]


def bar_text(bar: Bar | None) -> str | None:
    if bar is None:
        return None
    return f"ratio within {bar[1]:.0%} of 1" if bar[0] == "within" else f"ratio {bar[0]} {bar[1]:g}"


def meets(ratio: float | None, bar: Bar | None) -> bool | None:
    """Whether the bar is met; None where there is no bar, or nothing to hold to it."""
    if ratio is None or bar is None:
        return None
    return {
        ">=": ratio >= bar[1],
        "<=": ratio <= bar[1],
        "within": abs(ratio - 1) <= bar[1],
    }[bar[0]]


def make_row(
    job: str,
    name: str,
    value: float | None,
    unit: str,
    *,
    reference: float | None = None,
    inverse: bool = False,
    bar: Bar | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """One row. ratio is value / reference, or with `inverse` reference / value (where less is better).

    A value or reference that is not finite becomes None, with a note: it is no measurement.
    """
    odd = [x for x in (value, reference) if x is not None and not math.isfinite(x)]
    if odd:
        value, note = None, f"not finite: {odd[0]}" + (f"; {note}" if note else "")
    ratio = None
    if value and reference and not odd:
        ratio = reference / value if inverse else value / reference
    row = {"part": job.split(".")[0], "job": job, "name": name, "value": value, "unit": unit}
    row |= {"reference": None if odd else reference, "ratio": ratio, "bar": bar_text(bar), "passed": meets(ratio, bar)}
    return row | ({"note": note} if note else {})


def show(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    value = "not measured" if row["value"] is None else f"{row['value']:,.5g} {row['unit']}"
    text = f"{row['name']}: {value}"
    if row["ratio"] is not None:
        text += f", reference {row['reference']:,.5g}, ratio {row['ratio']:.3f}"
    if row["bar"]:
        text += f" ({row['bar']}: { {True: 'passed', False: 'MISSED', None: 'not judged'}[row['passed']] })"
    return text + (f" [{row['note']}]" if "note" in row else "")


class Results:
    """The rows of one file.

    Args:
      machine, versions: of this run. A file that another card, another version or the other mode (smoke or not) wrote
        is refused with ValueError: its rows and ours do not belong into one table.
      comparisons: makes the rows that compare others; they are made anew whenever the file is written.
    """

    def __init__(self, path: Path, machine: dict, versions: dict, *, smoke: bool, comparisons=lambda results: []):
        self.path, self.machine, self.versions, self.smoke = path, machine, versions, smoke
        self._comparisons = comparisons
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._take_over(json.loads(path.read_text()))

    def _take_over(self, report: dict[str, Any]) -> None:
        known = report["versions"]
        odd = {name: (known[name], v) for name, v in self.versions.items() if known.get(name, v) != v}
        smoke = any(row.get("smoke", False) for row in report["rows"])
        if report["machine"].get("card") != self.machine.get("card") or odd or (report["rows"] and smoke != self.smoke):
            raise ValueError(
                f"{self.path} holds results of {report['machine'].get('card')} ({smoke=}, other versions: {odd}), this "
                f"run is on {self.machine.get('card')} (smoke={self.smoke}): name another file with --out"
            )
        self.versions = known | self.versions
        self.rows = [row for row in report["rows"] if row["job"] != COMPARE]

    def begin(self, job: str) -> None:
        """Drops the rows of an earlier run of this job."""
        self.rows = [row for row in self.rows if row["job"] != job]
        self.save()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Takes a row in (in place of one of the same name), prints it and writes the file."""
        row = row | ({"smoke": True} if self.smoke else {})
        self.rows = [other for other in self.rows if other["name"] != row["name"]] + [row]
        print(show(row), flush=True)
        self.save()
        return row

    def row(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["name"] == name), None)

    def value(self, name: str) -> float | None:
        """The value of a row; None where it is missing or was not measured."""
        row = self.row(name)
        return None if row is None else row["value"]

    def compared(self) -> list[dict[str, Any]]:
        """The comparisons of the rows as they are now."""
        return [row | ({"smoke": True} if self.smoke else {}) for row in self._comparisons(self)]

    def save(self) -> None:
        """Writes the file whole: a run that is cut off leaves the last complete one."""
        report = {"machine": self.machine, "versions": self.versions, "rows": self.rows + self.compared()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        os.replace(part, self.path)
