"""Writing a decoder's own weights as a Hugging Face folder, after a full fine-tune."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.io.chat_template import Templates
from qlora_jax.io.companions import write_companions
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import other_parts
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.shards import write_shards
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import checkpoint, joined, table


def write_model(model: Decoder, out: Path, source: Path | None, *, chat_template: Templates | None = None) -> None:
    """Writes the weights beside the configuration and tokenizer files of `source`, replacing the folder whole.

    `chat_template` takes the place of the source's. Other parts of the source, such as a tower, are passed on.

    Raises:
      OSError: with the system's errno, such as ENOSPC; the folder is then as it was.
    """
    weights = {path: _weight(model, path) for path in table(model.config)}
    tensors = None if source is None else TensorFolder(source)
    others = [] if tensors is None else sorted(other_parts(model.config, tensors))
    needed = sum(weight.nbytes for weight in weights.values())
    needed += sum(tensors.nbytes(name) for name in others) if tensors else 0
    earlier = [file.name for file in out.iterdir()] if out.is_dir() else []
    with new_folder(out, needed=needed, replaceable=earlier) as fresh:
        if source is not None:
            dtype = str(next(iter(weights.values())).dtype)
            tied = model.config.tie_embeddings
            write_companions(source, fresh, dtype=dtype, tied=tied, chat_template=chat_template)
        passed = ((name, tensors.read(name)) for name in others) if tensors else ()
        write_shards(fresh, itertools.chain(_tensors(model.config, weights), passed))


def _weight(model: Decoder, path: str) -> Any:
    node: Any = model
    for name in path.split("."):
        node = getattr(node, name)
    return node.get_value()


def _tensors(config: ModelConfig, weights: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for name, parts in checkpoint(config).items():
        values = [np.asarray(weights[part.tensor.param.path])[part.tensor.place][part.rows] for part in parts]
        yield name, joined(parts, values)
