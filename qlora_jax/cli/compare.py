"""`scripts/compare.py`: full fine-tuning, LoRA and QLoRA of one base on the same data, side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.cli import environment
from qlora_jax.cli.arguments import config_parser, parse_with_config
from qlora_jax.cli.errors import reports_errors


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = config_parser("compare.py", "Train one base in full, by LoRA and by QLoRA, and compare the results.")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one of the same comparison")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    length.add_argument("--ablations", action="store_true", help="also other formats, ranks and targets")
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and leaves compare.json and report.html; exit code 128 + N when signal N stopped a run."""
    options, config = parse_with_config(parser(), argv)
    environment.prepare(deterministic=config.train.deterministic)
    from qlora_jax.run.compare import compare  # JAX reads its settings when it is imported

    mode = "quick" if options.quick else "ablations" if options.ablations else "default"
    return compare(config, Path(options.out), mode)
