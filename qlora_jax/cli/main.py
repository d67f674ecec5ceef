"""The `qlora-jax` command: `qlora-jax train …` is `python scripts/train.py …`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "fine-tune a model",
    "quantize": "write a model in 4 bits",
    "export": "write a run as an adapter or as a merged model",
    "generate": "continue a prompt",
    "evaluate": "measure loss and perplexity on a file",
    "serve": "answer requests over HTTP, one base and many adapters",
    "plan": "say whether a run fits a GPU, without one",
    "compare": "full fine-tuning, LoRA and QLoRA side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Only that command's module is imported."""
    parser = argparse.ArgumentParser(prog="qlora-jax", description="QLoRA fine-tuning in JAX on one GPU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    words = list(sys.argv[1:] if argv is None else argv)
    # Only the first word is ours: the rest, --help included, belongs to the command.
    command = parser.parse_args(words[:1]).command
    return importlib.import_module(f"qlora_jax.cli.{command}").main(words[1:])
