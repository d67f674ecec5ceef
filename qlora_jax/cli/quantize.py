"""`scripts/quantize.py`: write a model in bitsandbytes' 4-bit format."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.cli import environment
from qlora_jax.cli.errors import reports_errors


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        "quantize.py", description="Write a model in NF4 (4 bits), as bitsandbytes stores it."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|HUB_ID",
        help="a Hugging Face model in 16 or 32 bits: its folder or Hub name",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, a new one")
    parser.add_argument(
        "--no-double", action="store_true", help="keep the blocks' scales in fp32 instead of quantizing them, too"
    )
    return parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder and says where."""
    environment.prepare()
    options = parser().parse_args(argv)
    from qlora_jax.io.export_bnb4 import export_bnb4
    from qlora_jax.io.hf import resolve_folder

    export_bnb4(resolve_folder(options.model), Path(options.out), double=not options.no_double)
    print(f"wrote {options.out}", file=sys.stderr)
    return 0
