"""What generate.py, evaluate.py and serve.py share: a model folder, with or without an adapter, ready to run."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax import kernels
from qlora_jax.data import limit_vocabulary, load_chat_template, load_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import load_model, read_config, resolve_folder
from qlora_jax.io.json_object import read_object
from qlora_jax.io.peft import Adapter, attach_adapter, read_adapter
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.config import DTYPES
from qlora_jax.training.step import Parts, split_model


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """--model, --quant, --dtype, --chat-template, and --adapter."""
    parser.add_argument("--model", required=True, metavar="DIR|HUB_ID", help="a Hugging Face model")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter folder")
    parser.add_argument("--quant", choices=("auto", "none", "nf4"), default="auto", help="auto: what the folder holds")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="number format of the computation")
    parser.add_argument(
        "--chat-template",
        metavar="FILE|chatml",
        help="a Jinja file, or a built-in one, before the adapter's own and the model's",
    )


@dataclass(frozen=True)
class Ready:
    """A model taken apart for jit, its tokenizer and its folder."""

    parts: Parts
    tokenizer: Any
    folder: Path
    max_position: int

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a text."""
        return stop_ids_of(self.folder, self.tokenizer)


def open_tokenizer(folder: Path, *, chosen: str | None, adapter: Adapter | None = None) -> Tokenizer:
    """The model's tokenizer with the chat template that holds: the chosen one, else the adapter's, else the model's."""
    tokenizer = load_tokenizer(str(folder))
    if chosen is not None:
        tokenizer.chat_template = _read_template(chosen)
    elif adapter is not None and adapter.chat_template is not None:
        tokenizer.chat_template = adapter.chat_template
    return tokenizer


def _read_template(chosen: str) -> str | None:
    try:
        return load_chat_template(chosen)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("data.chat_template=", "--chat-template ")) from error


def stop_ids_of(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text, by generation_config.json and by the tokenizer. Raises ValueError."""
    file = folder / "generation_config.json"
    listed = read_object(file).get("eos_token_id") if file.exists() else None
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id is {listed!r}, expected a token's id or a list of them")
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def quantization_of(adapter: Adapter | None) -> Quantization:
    """How the base was stored when the adapter was trained, as recorded beside it; the default for any other."""
    recorded = adapter.extra if adapter else {}
    names = {field.name for field in dataclasses.fields(Quantization)}
    return Quantization(**{name: value for name, value in recorded.items() if name in names})


def prepare_model(options: argparse.Namespace) -> Ready:
    """Loads what the arguments name. Raises the loaders' ValueError, FileNotFoundError or NotImplementedError."""
    kernels.available(DTYPES[options.dtype])
    folder = resolve_folder(options.model)
    geometry = read_config(folder)
    adapter = read_adapter(Path(options.adapter), TensorFolder(folder)) if options.adapter else None
    tokenizer = open_tokenizer(folder, chosen=options.chat_template, adapter=adapter)
    limit_vocabulary(tokenizer, geometry.vocab_size)
    packing = quantization_of(adapter)
    loaded = load_model(folder, dtype=DTYPES[options.dtype], quant=options.quant, quantization=packing)
    if adapter is not None:
        attach_adapter(loaded.model, adapter, base_hash=loaded.content_hash)
    return Ready(split_model(loaded.model), tokenizer, folder, geometry.max_position)
