"""`scripts/export.py`: turn a run into an adapter folder, or a run or any adapter into a merged model."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors

FORMATS = {
    "peft": "the adapter alone, for PEFT",
    "merged": "the whole model with the adapter added in",
    "bnb4": "the merged model, quantized to NF4 again for bitsandbytes",
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser("export.py", description="Write a run's result in a format other tools read.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN_DIR", help="the run's output_dir")
    source.add_argument("--adapter", metavar="DIR", help="any PEFT adapter folder, instead of a run")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--format", required=True, choices=tuple(FORMATS), help="; ".join(f"{k}: {v}" for k, v in FORMATS.items())
    )
    parser.add_argument(
        "--merge-into",
        choices=("original", "dequantized"),
        default="original",
        help="merged: add to the original weights in their dtype, or to the dequantized ones in the run's",
    )
    parser.add_argument(
        "--step", type=checkpoint_step, metavar="N|best", help="a checkpoint instead of the run's final state"
    )
    parser.add_argument(
        "--model", metavar="DIR|HUB_ID", help="the base, if it is not where the run or the adapter says"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of merged weights; see --merge-into")
    return parser


def checkpoint_step(text: str) -> int | str:
    """A step, or "best": the checkpoint with the lowest eval_loss."""
    return text if text == "best" else int(text)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder and says where."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.run import export as exporting

    if options.adapter:
        exporting.export_adapter(Path(options.adapter), Path(options.out), options)
    else:
        _export_run(Path(options.run), Path(options.out), options)
    print(f"wrote {options.out}: {FORMATS[options.format]}", file=sys.stderr)
    return 0


def _export_run(run: Path, out: Path, options: argparse.Namespace) -> None:
    from qlora_jax.run import export as exporting

    config = exporting.read_run(run)
    if config.method == "full":
        exporting.copy_full(run, out, options.format, options.step)
        return
    adapter = exporting.adapter_folder(run, config, options.step)
    try:
        exporting.export_run(config, adapter, out, options)
    finally:
        if options.step is not None:
            shutil.rmtree(adapter.parent)
