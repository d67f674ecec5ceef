"""Loading a Hugging Face model folder into a decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from qlora_jax.io.bitsandbytes import is_nf4, read_nf4
from qlora_jax.io.build import Quantization, build_model, random_read
from qlora_jax.io.foreign import ORIGINAL, quantized_names
from qlora_jax.io.identity import BaseIdentity
from qlora_jax.io.model_config import read_config
from qlora_jax.io.packing import all_packed, folder_forms, report_kept
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.tied import read_head_as_embedding
from qlora_jax.models.blocks.layers import Frozen
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import Spec, hf_name, parameter_specs
from qlora_jax.quant.nf4 import dequantize

FLOATS = ("BF16", "F16", "F32", "F64")
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A decoder and where it came from.

    Attributes:
      content_hash: identity of the source checkpoint's tensors before quantization.
      folder: the checkpoint's folder on this machine; None for random weights.
    """

    model: Decoder
    content_hash: str
    folder: Path | None


def load_model(
    folder: Path,
    *,
    dtype: str,
    quant: str,
    quantization: Quantization | None = None,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
) -> LoadedModel:
    """Streams a checkpoint folder into a decoder.

    Args:
      folder: holds config.json and safetensors files.
      dtype: "bfloat16", "float16" or "float32".
      quant: "nf4" packs every projection (or keeps it packed), "none" unpacks, "auto" keeps what the folder holds;
        "qlora", for training, packs every projection unless the folder packs some: then it keeps the others.
      quantization: how to pack; the default Quantization() where None.
      kind: Flax variable type of the weights.
      host_embedding: leaves the embedding in host memory (models/host_table.py).

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: with the name of what is missing, wrong or unsupported.
    """
    config, tensors = open_folder(folder)
    identity = BaseIdentity(tensors)

    def read(name: str, spec: Spec) -> Any:
        return _read(tensors, name, spec, identity, unpack=quant == "none")

    forms = {} if quant == "none" else folder_forms(config, tensors)
    report_kept(folder, forms, packed=quant == "nf4")
    model = build_model(
        config,
        read,
        dtype=dtype,
        quantization=(quantization or Quantization()) if quant in ("nf4", "qlora") else None,
        kind=kind,
        host_embedding=host_embedding,
        forms=all_packed(forms) if quant == "nf4" else forms,
    )
    return LoadedModel(model, identity.hexdigest(), folder)


def random_model(
    config: ModelConfig, seed: int, *, dtype: str, quantization: Quantization | None, kind=Frozen, host_embedding=False
) -> LoadedModel:
    """A decoder with random weights, for benchmarks and for training from scratch."""
    model = build_model(
        config,
        random_read(config, seed),
        dtype=dtype,
        quantization=quantization,
        kind=kind,
        host_embedding=host_embedding,
    )
    return LoadedModel(model, f"random-{seed}", None)


def resolve_folder(path: str) -> Path:
    """The local folder of a model: `path` itself, or the download of a Hub repository of that name.

    Raises:
      FileNotFoundError: neither a folder nor a name that the Hub answers for.
    """
    if path and Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model.path={path!r} is no folder: give a folder with a Hugging Face model, or ORG/NAME"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=DOWNLOADED))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the Hub has no model {path!r}, or it is gated: check the name, or log in") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"model {path!r} is no local folder and the Hugging Face Hub cannot be reached ({type(error).__name__}): "
            f"download it elsewhere and pass its folder, --config.model.path=DIR or --model DIR"
        ) from error


def open_folder(folder: Path) -> tuple[ModelConfig, TensorFolder]:
    """A checkpoint's configuration and its tensors, by the names that the decoder's parameters have.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: as `read_config` and `TensorFolder`; tensors that are missing
        or that the decoder would ignore.
    """
    config = read_config(folder)
    tensors = TensorFolder(folder)
    if config.tie_embeddings:
        read_head_as_embedding(tensors)
    check_names(config, tensors)
    return config, tensors


def check_names(config: ModelConfig, tensors: TensorFolder) -> None:
    """Refuses a checkpoint that lacks a parameter or holds one that the decoder would ignore."""
    wanted = set()
    for path in parameter_specs(config):
        stacked = path.startswith("layers.")
        wanted |= {hf_name(path, layer) for layer in range(config.num_layers if stacked else 1)}
    foreign = quantized_names(tensors.names)
    if foreign:
        raise NotImplementedError(f"{tensors.folder} is quantized with {foreign}, which is not read: {ORIGINAL}")
    missing = sorted(wanted - tensors.names)
    if missing:
        why = " (config.json has tie_word_embeddings=false: it must be there)" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{tensors.folder} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]!r} first{why}")
    extra = sorted(name for name in tensors.names - wanted if not _harmless(name, config, wanted))
    if extra:
        raise ValueError(
            f"{tensors.folder} holds {len(extra)} tensors that no {config.family} decoder has, {extra[0]!r} first"
        )


def _harmless(name: str, config: ModelConfig, wanted: set[str]) -> bool:
    """Whether a tensor can be left unread: derived frequencies, the tied head's copy, a packed weight's scales.

    That a tied head is a copy was looked at when the configuration was read: with another one it is not tied.
    """
    tied = name == "lm_head.weight" and config.tie_embeddings
    scales = any(name.rsplit(".", dots)[0] in wanted for dots in (1, 2))
    return tied or scales or name.endswith("rotary_emb.inv_freq")


def _read(tensors: TensorFolder, name: str, spec: Spec, identity: BaseIdentity, *, unpack: bool) -> Any:
    raw = identity.read(name)
    if is_nf4(tensors, name):
        packed = read_nf4(tensors, name, spec.shape)
        return dequantize(packed) if unpack else packed
    if tensors.dtype(name) not in FLOATS or raw.shape != spec.shape:
        raise ValueError(
            f"{tensors.file(name)}: {name!r} is {tensors.dtype(name)} {raw.shape}, "
            f"expected {'/'.join(FLOATS)} {spec.shape}"
        )
    return np.asarray(raw)
