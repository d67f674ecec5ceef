"""How long a context fits? The longest by compiled peak, for Llama-3-8B at rank 32, beside Unsloth's published ones.

    pip install -e '.[plan]'; JAX_PLATFORMS=cpu python benchmarks/longest_context.py [--card GB …]

The plan's arithmetic proposes a length, XLA's compiler states its peak, and the length is corrected until the peak is
just within the card less the CUDA context. Nothing runs, and no GPU is needed. Writes
benchmarks/results/longest-context.json and the table in docs/memory.md.
"""

import argparse
import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.memory_rows import LONG_ROWS, Row  # noqa: E402
from benchmarks.memory_targets import config_of, measure  # noqa: E402
from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.io.hf import read_config  # noqa: E402
from qlora_jax.memory.advice import LENGTH_STEP, longest_sequence  # noqa: E402
from qlora_jax.memory.plan import Planner  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "longest-context.json"
PAGE = ROOT / "docs" / "memory.md"
# Longer than any of these cards holds.
BEYOND = 1 << 22
# A length is accepted when less than this share of the budget is left.
CLOSE = 0.005
TRIES = 5


def with_length(row: Row, tokens: int) -> Row:
    others = [one for one in row.overrides if not one.startswith(("train.seq_len=", "model.max_position="))]
    lengths = (f"train.seq_len={tokens}", f"model.max_position={tokens}")
    return dataclasses.replace(row, tokens=f"{tokens:,}", overrides=(*others, *lengths))


def proposed(row: Row) -> int:
    """The longest sequence by arithmetic."""
    config = config_of(with_length(row, BEYOND), None, Path())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=LENGTH_STEP))
    return longest_sequence(Planner(config, read_config(Path(config.model.geometry))), int(row.limit))


def longest(row: Row) -> dict:
    """The longest length found to fit, with its compiled peak."""
    peaks: dict[int, dict] = {}
    tokens = proposed(row)
    for _ in range(TRIES):
        peaks[tokens] = measure(with_length(row, tokens), row.gpus[0])
        print(f"{row.name}: {tokens:,} tokens take {peaks[tokens]['peak'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
        if 0 <= row.limit - peaks[tokens]["peak"] <= CLOSE * row.limit:
            break
        tokens = corrected(row, peaks)
    fitting = [count for count, sizes in peaks.items() if sizes["peak"] <= row.limit]
    if not fitting:
        raise SystemExit(f"{row.name}: none of {sorted(peaks)} tokens fits {row.limit / 1e9:.1f} GB")
    best = max(fitting)
    return {"tokens": best, "gpu": row.gpus[0], "limit": row.limit, **peaks[best]}


def corrected(row: Row, peaks: dict[int, dict]) -> int:
    """A length nearer to the limit: on the line through the last two, or with the last one's bytes a token."""
    (last, sizes), *before = reversed(peaks.items())
    if before:
        other, previous = before[0]
        slope = (sizes["peak"] - previous["peak"]) / (last - other)
    else:
        slope = sizes["temporaries"] / last
    # Half of what may be left over stays free, so that the next one fits.
    target = row.limit * (1 - CLOSE / 2)
    return int(last + (target - sizes["peak"]) / slope) // LENGTH_STEP * LENGTH_STEP


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| card | longest here | compiled peak | host memory | Unsloth's | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['card']} GB ({row['gpu']}) | {row['tokens']:,} | {row['peak'] / 1e9:.2f} GB "
            f"| {row['host'] / 1e9:.0f} GB | {row['peer']:,} | {row['tokens'] / row['peer']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: list[dict]) -> None:
    """The result file and the page's table; cards that were not asked for stay as they were."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")}
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    known = {row["card"]: row for row in (*old, *rows)}
    rows = [known[card] for card in sorted(known)]
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    fill_part(PAGE, "context-table", table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=int, action="append", metavar="GB", choices=LONG_ROWS, help="all where none")
    for card in parser.parse_args().card or LONG_ROWS:
        tokens, row = LONG_ROWS[card]
        write([{"card": card, "peer": tokens, **longest(row)}])
    print(table(json.loads(RESULT.read_text())["rows"]))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
