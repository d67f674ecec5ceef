"""Writing a decoder's own weights as a Hugging Face folder, after a full fine-tune."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.io.chat_template import Templates
from qlora_jax.io.companions import write_companions
from qlora_jax.io.folder import new_folder
from qlora_jax.io.shards import write_shards
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import checkpoint, joined, table


def write_model(model: Decoder, out: Path, source: Path | None, *, chat_template: Templates | None = None) -> None:
    """Writes the weights beside the configuration and tokenizer files of `source`, replacing the folder whole.

    `chat_template` takes the place of the source's.

    Raises:
      OSError: with the system's errno, such as ENOSPC; the folder is then as it was.
    """
    weights = {path: _weight(model, path) for path in table(model.config)}
    needed = sum(weight.nbytes for weight in weights.values())
    earlier = [file.name for file in out.iterdir()] if out.is_dir() else []
    with new_folder(out, needed=needed, replaceable=earlier) as fresh:
        if source is not None:
            dtype = str(next(iter(weights.values())).dtype)
            tied = model.config.tie_embeddings
            write_companions(source, fresh, dtype=dtype, tied=tied, chat_template=chat_template)
        write_shards(fresh, _tensors(model.config, weights))


def _weight(model: Decoder, path: str) -> Any:
    node: Any = model
    for name in path.split("."):
        node = getattr(node, name)
    return node.get_value()


def _tensors(config: ModelConfig, weights: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for name, parts in checkpoint(config).items():
        values = [np.asarray(weights[part.param.path])[part.place] for part in parts]
        yield name, joined(parts, values)
