"""Stores a comparison's compare.json among the results, and puts its figures into README.md and docs/quality.md.

    python scripts/compare.py --config configs/demo.py --out runs/compare
    python benchmarks/quality_pages.py runs/compare/compare.json

Without a file, the pages are written again from benchmarks/results/compare.json. The ablations and the comparison of
configs/large.py have result files of their own, compare-ablations.json and compare-large.json: which one it is, the
file itself says.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.config import load_config  # noqa: E402
from qlora_jax.report.words import (  # noqa: E402
    figures,
    gigabytes,
    percent,
    size,  # noqa: E402
)

RESULTS = ROOT / "benchmarks" / "results"
FILES = {
    "default": RESULTS / "compare.json",
    "ablations": RESULTS / "compare-ablations.json",
    "large": RESULTS / "compare-large.json",
}
DEMO_BASE, LARGE_BASE = (load_config(ROOT / "configs" / name).model.path for name in ("demo.py", "large.py"))
README, PAGE = ROOT / "README.md", ROOT / "docs" / "quality.md"
# Share of the full fine-tune's held-out gain, mean of the seeds.
BAR = 0.97
NOT_RUN = "**Not run yet.** `benchmarks/quality_pages.py FILE` puts the figures here.\n"


def side_by_side(result: dict) -> str:
    """The README's table: what a method needs for a 7B model, and what it reaches on the demo's tasks."""
    seven = {row["method"]: row for row in result["memory"]["rows"]}
    lines = [
        "| | 7B weights | 7B train step | trained of 7B | demo: held-out loss | exact match | gain kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"][1:4]:
        memory = seven[row["method"]]
        lines.append(
            f"| {row['title']} | {gigabytes(memory['weights_bytes'])} | {gigabytes(memory['total_bytes'])} "
            f"| {memory['trainable_share']:.2%} | {row['heldout_loss']:.4f} | {percent(row['exact_match'])} "
            f"| {percent(row['gain_kept'])} |"
        )
    return "\n".join(lines) + "\n"


HEADS = ("method", "rate", "trained", "step's peak", "tokens/s", "held-out loss", "exact match", "gain kept")


def table(result: dict, without: tuple[str, ...] = ()) -> str:
    """Every row of a compare.json as Markdown, without the columns of these heads."""
    heads = [head for head in HEADS if head not in without]
    lines = [heads, ["---"] * len(heads)]
    for row in result["rows"]:
        found = figures(row) | {"trained": f"{row['trainable']:,}", "step's peak": size(row["peak_bytes"] or 0)}
        lines.append([found[head] for head in heads])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ablations(result: dict) -> str:
    """The table without speeds: hours of runs are seldom alone on a machine."""
    return table(result, without=("tokens/s",))


def verdict(result: dict) -> str:
    """Whether QLoRA keeps what it should."""
    qlora = next(row for row in result["rows"] if row["method"] == "qlora")
    held = "within" if qlora["gain_kept"] >= BAR else "MISSING"
    low, high = qlora["spread"]["gain_kept"]
    return (
        f"QLoRA keeps {qlora['gain_kept']:.1%} of the full fine-tune's gain in held-out loss ({low:.1%} to {high:.1%} "
        f"over {len(qlora['seeds'])} seeds), {held} the bar of {BAR:.0%}, and {percent(qlora['exact_match_kept'])} of "
        "its gain in exact matches.\n"
    )


def large(result: dict) -> str:
    """The comparison on the large base, with the machine that it ran on."""
    machine = result["machine"]
    where = machine["cpu"] if machine["platform"] == "cpu" else machine["device"]
    steps = result["config"]["train"]["steps"]
    return f"{table(result)}\n{verdict(result)}Measured on: {where}; {result['mode']} comparison of {steps} steps.\n"


def sections(results: dict[str, dict]) -> dict[Path, dict[str, str]]:
    """What stands between which markers of which page."""
    default = results["default"]
    return {
        README: {"side-by-side": side_by_side(default)},
        PAGE: {
            "comparison": f"{table(default)}\n{verdict(default)}",
            "ablations": ablations(results["ablations"]) if "ablations" in results else NOT_RUN,
            "large": large(results["large"]) if "large" in results else NOT_RUN,
        },
    }


def stored() -> dict[str, dict]:
    """The committed results, by keys of FILES."""
    return {kind: json.loads(file.read_text()) for kind, file in FILES.items() if file.exists()}


def kind_of(result: dict) -> str:
    """A key of FILES. Raises ValueError where the pages have no place for such a comparison."""
    if not {"config", "mode", "rows"} <= result.keys():
        raise ValueError("no compare.json: give the file that scripts/compare.py leaves in its --out")
    base, mode = result["config"]["model"]["path"], result["mode"]
    if base == LARGE_BASE:
        return "large"
    if base == DEMO_BASE and mode in FILES:
        return mode
    raise ValueError(f"a {mode} comparison of {base}: expected three seeds of {DEMO_BASE}, or one of {LARGE_BASE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, metavar="FILE", help="a compare.json")
    file = parser.parse_args().result
    if file is not None:
        result = json.loads(file.read_text())
        try:
            FILES[kind_of(result)].write_text(json.dumps(result, indent=1) + "\n")
        except ValueError as error:
            parser.error(f"{file} is {error}")
    for page, parts in sections(stored()).items():
        for name, text in parts.items():
            fill_part(page, name, text)


if __name__ == "__main__":
    main()
