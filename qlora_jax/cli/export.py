"""`scripts/export.py`: turn a run into an adapter folder, or a run or any adapter into a merged model."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors

FORMATS = {
    "peft": "the adapter alone, for PEFT",
    "merged": "the whole model with the adapter added in",
    "bnb4": "the merged model, quantized to NF4 again for bitsandbytes",
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        "export.py", description="Write what a run has learned in a format that other tools read."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN_DIR", help="the run folder: train.py's output_dir")
    source.add_argument("--adapter", metavar="DIR", help="instead of a run: the folder of any PEFT adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, a new one")
    parser.add_argument(
        "--format", required=True, choices=tuple(FORMATS), help="; ".join(f"{k}: {v}" for k, v in FORMATS.items())
    )
    parser.add_argument(
        "--merge-into",
        choices=("original", "dequantized"),
        default="original",
        help="with --format merged: add to the original weights (the default), or to the 4-bit ones that training saw",
    )
    parser.add_argument(
        "--step",
        type=checkpoint_step,
        metavar="N|best",
        help="of a run: a checkpoint instead of its end; best has the lowest eval_loss",
    )
    parser.add_argument(
        "--model", metavar="DIR|HUB_ID", help="the base, where it is not where the run or the adapter says"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of merged weights (default: the original weights' own; with dequantized, the run's)",
    )
    return parser


def checkpoint_step(text: str) -> int | str:
    """A step, or "best": the checkpoint with the lowest eval_loss."""
    return text if text == "best" else int(text)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder and says where."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.run.export import ADAPTER_ALREADY, export, export_adapter

    same: dict[str, Any] = {name: getattr(options, name) for name in ("format", "merge_into", "model", "dtype")}
    if options.run:
        export(options.run, options.out, step=options.step, **same)
    elif options.step is not None:
        raise ValueError(ADAPTER_ALREADY)
    else:
        export_adapter(options.adapter, options.out, **same)
    print(f"wrote {options.out}: {FORMATS[options.format]}", file=sys.stderr)
    return 0
