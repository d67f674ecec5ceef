"""`scripts/compare.py`: full fine-tuning, LoRA and QLoRA of one base on the same data, side by side."""

import argparse
import sys
from collections.abc import Sequence
from typing import Literal

from qlora_jax.cli import environment
from qlora_jax.cli.arguments import config_parser, parse_with_config
from qlora_jax.cli.errors import exit_code, reports_errors


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = config_parser(
        "compare.py", "Train one model in full, by LoRA and by QLoRA, and compare what they learn and cost."
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder, or that of this comparison, which then goes on"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer steps, and one seed instead of three")
    length.add_argument("--ablations", action="store_true", help="also try other 4-bit formats, ranks and layers")
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and leaves compare.json and report.html; exit code 128 + N when signal N stopped a run."""
    options, config = parse_with_config(parser(), argv)
    environment.prepare(deterministic=config.train.deterministic)
    from qlora_jax.report.comparison_table import print_tables
    from qlora_jax.run.compare import compare  # JAX reads its settings when it is imported

    mode: Literal["quick", "default", "ablations"]
    mode = "quick" if options.quick else "ablations" if options.ablations else "default"
    found = compare(config, options.out, mode=mode, progress=True)
    if found.result is not None:
        print_tables(found.result, sys.stdout)
        print(f"done: {found.file}, {found.page}", file=sys.stderr, flush=True)
    return exit_code(found.stopped)
