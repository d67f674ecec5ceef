"""Writing a decoder's own weights as a Hugging Face folder, after a full fine-tune."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qlora_jax.models.decoder import Decoder
from qlora_jax.models.parameters import STACK, hf_name, parameter_specs

# Everything beside the weights that makes a folder loadable.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


def write_model(model: Decoder, out: Path, source: Path | None) -> None:
    """Writes `out/model.safetensors` beside the configuration and tokenizer files of `source`, replacing the folder whole.

    Raises:
      ValueError: some weight is packed.
    """
    fresh = out.with_name(out.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for pattern in COMPANIONS if source else ():
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, fresh)
    save_file(_tensors(model), fresh / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def _tensors(model: Decoder) -> dict[str, np.ndarray]:
    tensors = {}
    for path in parameter_specs(model.config):
        node = model
        for name in path.split("."):
            node = getattr(node, name)
        value = np.asarray(node.get_value())
        if path.startswith(STACK):
            tensors |= {hf_name(path, layer): value[layer] for layer in range(model.config.num_layers)}
        else:
            tensors[hf_name(path)] = value
    return tensors
