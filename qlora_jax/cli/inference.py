"""What generate.py, evaluate.py and serve.py share: a model folder, with or without an adapter, ready to run."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax import kernels
from qlora_jax.data import check_vocabulary, load_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import load_model, read_config, resolve_folder
from qlora_jax.io.peft import Adapter, attach_adapter, read_adapter
from qlora_jax.models.config import DTYPES
from qlora_jax.train.step import Parts, split_model


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter: bool = True) -> None:
    """--model, --quant, --dtype, and --adapter."""
    parser.add_argument("--model", required=True, metavar="DIR|HUB_ID", help="a Hugging Face model")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter folder")
    parser.add_argument("--quant", choices=("auto", "none", "nf4"), default="auto", help="auto: what the folder holds")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="number format of the computation")


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


def stop_ids_of(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text, by generation_config.json and by the tokenizer."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = listed if isinstance(listed, list) else [listed]
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
    tokenizer = load_tokenizer(str(folder))
    check_vocabulary(tokenizer, geometry.vocab_size)
    adapter = read_adapter(Path(options.adapter)) if options.adapter else None
    packing = quantization_of(adapter)
    loaded = load_model(folder, dtype=DTYPES[options.dtype], quant=options.quant, quantization=packing)
    if adapter is not None:
        attach_adapter(loaded.model, adapter, base_hash=loaded.content_hash)
    return Ready(split_model(loaded.model), tokenizer, folder, geometry.max_position)
