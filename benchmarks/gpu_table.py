"""Makes the table of docs/benchmarks.md from benchmarks/results/CARD-DATE.json.

    python benchmarks/gpu_table.py [--check]

The table holds measurements only: a row that was not measured says so and why, and a smoke run's file is refused.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.pages import fill_part, read_part  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PART = "gpu-table"
DATED = re.compile(r".+-\d{4}-\d{2}-\d{2}\.json")
# In the page's order: (part, its heading).
HEADINGS = {
    "exact": "Is it right?",
    "ceilings": "What the card can do",
    "kernels": "Kernels",
    "train": "Train step and loading",
    "decode": "Generation",
    "large": "65B on one card",
    "peers": "Peers",
    "compare": "Against peers and 16-bit weights",
}
NOTHING = (
    "**No GPU has been measured yet.** On one, `python benchmarks/gpu_suite.py` measures everything, and "
    "`python benchmarks/gpu_table.py` then puts the figures here.\n"
)
VERDICTS = {True: "met", False: "**missed**", None: "not judged"}


def figure(value: float | None) -> str:
    """Four significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.4g}'):,}".removesuffix(".0")


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    value = "not measured" if row["value"] is None else f"{figure(row['value'])} {row['unit']}"
    verdict = f"{row['bar']}: {VERDICTS[row['passed']]}" if row["bar"] else ""
    cells = (row["name"], value, figure(row["reference"]), figure(row["ratio"]), verdict, row.get("note", ""))
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def section(heading: str, rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["", f"#### {heading}", "", "Not measured."]
    head = ["| | value | reference | ratio | bar | note |", "| --- | ---: | ---: | ---: | --- | --- |"]
    return ["", f"#### {heading}", "", *head, *map(line, rows)]


def card(report: dict[str, Any], name: str) -> list[str]:
    """Everything about one result file. ValueError for a smoke run's."""
    if any(row.get("smoke") for row in report["rows"]):
        raise ValueError(f"{name} was written by a smoke run: it measures nothing, delete it")
    machine, versions = report["machine"], report["versions"]
    known = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = ["", f"### {machine['card']}, {name[-15:-5]}", ""]
    lines.append(f"Driver {machine.get('driver')}, {machine.get('cpu')}, {machine.get('cores')} cores. {known}.")
    for part, heading in HEADINGS.items():
        lines += section(heading, [row for row in report["rows"] if row["part"] == part])
    return lines


def table(folder: Path) -> str:
    """The page's part as Markdown."""
    files = sorted(file for file in folder.glob("*.json") if DATED.fullmatch(file.name))
    if not files:
        return NOTHING
    return (
        "\n".join(text for file in files for text in card(json.loads(file.read_text()), file.name)).strip("\n") + "\n"
    )


def main() -> int:
    """Writes the page; with --check only compares. Exit code 1 where it differs, or a file is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what the files give")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to fill")
    options = parser.parse_args()
    try:
        new = table(options.results)
        if options.check:
            return int(read_part(options.page, PART) != new)
        fill_part(options.page, PART, new)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
