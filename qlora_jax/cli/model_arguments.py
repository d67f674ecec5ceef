"""The arguments of the commands that load a model."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_jax.run.load import ModelSource


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """--model, --quant, --dtype, --chat-template, and --adapter."""
    from qlora_jax.models.config import DTYPES  # JAX reads its settings when it is imported

    parser.add_argument(
        "--model", required=True, metavar="DIR|HUB_ID", help="a Hugging Face model: its folder or Hub name"
    )
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="the folder of a PEFT adapter for it")
    parser.add_argument(
        "--quant",
        choices=("auto", "none", "nf4"),
        default="auto",
        help="how its weights are held: as in the folder (auto, the default), unpacked, or in 4 bits",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="number format to compute in (default: bf16)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE|chatml",
        help="this Jinja file, or the built-in chatml, instead of the adapter's or the model's own template",
    )


def model_source(options: argparse.Namespace) -> "ModelSource":
    """What they name."""
    from qlora_jax.run.load import ModelSource

    return ModelSource(
        path=options.model,
        adapter=options.adapter,
        quant=options.quant,
        dtype=options.dtype,
        chat_template=options.chat_template,
    )
