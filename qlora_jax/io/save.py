"""Writing a decoder's own weights as a Hugging Face folder, after a full fine-tune."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.io.shards import write_shards
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.parameters import STACK, hf_name, parameter_specs

# Everything beside the weights that makes a folder loadable.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


def write_model(model: Decoder, out: Path, source: Path | None) -> None:
    """Writes the weights beside the configuration and tokenizer files of `source`, replacing the folder whole.

    Raises:
      OSError: with the system's errno, such as ENOSPC; the folder is then as it was.
    """
    fresh = out.with_name(out.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        if source is not None:
            _copy_companions(source, fresh)
        write_shards(fresh, _tensors(model))
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder)


def _tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    for path in parameter_specs(model.config):
        node: Any = model
        for name in path.split("."):
            node = getattr(node, name)
        value = np.asarray(node.get_value())
        if path.startswith(STACK):
            yield from ((hf_name(path, layer), value[layer]) for layer in range(model.config.num_layers))
        else:
            yield hf_name(path), value
