"""Loading a Hugging Face model folder into a decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from qlora_jax.io.build import build_model, random_read
from qlora_jax.io.foreign import ORIGINAL, quantized_names
from qlora_jax.io.identity import BaseIdentity
from qlora_jax.io.model_config import read_config as read_config
from qlora_jax.io.model_config import read_with_tensors
from qlora_jax.io.packed import open_tensors, reader_of
from qlora_jax.io.packing import all_packed, folder_forms, report_kept
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.tied import read_head_as_embedding
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.params import Part, Tensor
from qlora_jax.models.table import checkpoint
from qlora_jax.quant.packed import dequantized
from qlora_jax.quant.rules import AS_HELD, Rules

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
    rules: Rules = AS_HELD,
    kind: type[nnx.Variable] = Frozen,
    host_embedding: bool = False,
) -> LoadedModel:
    """Streams a checkpoint folder into a decoder.

    Args:
      folder: holds config.json and safetensors files.
      dtype: "bfloat16", "float16" or "float32".
      rules: how the weights are stored, and what becomes of those that the folder holds packed.
      kind: Flax variable type of the weights.
      host_embedding: leaves the embedding in host memory (quant/host_table.py).

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: with the name of what is missing, wrong or unsupported.
    """
    config, tensors = open_folder(folder)
    identity = BaseIdentity(tensors)
    forms = {} if rules.held == "unpacked" else folder_forms(config, tensors, experts=not rules.unpacks(expert=True))
    report_kept(folder, config, forms, packed=rules.held == "completed")
    model = build_model(
        config,
        _Source(tensors, identity, rules).read,
        dtype=dtype,
        rules=rules,
        kind=kind,
        host_embedding=host_embedding,
        forms=all_packed(forms) if rules.held == "completed" else forms,
    )
    return LoadedModel(model, identity.hexdigest(), folder)


def random_model(
    config: ModelConfig, seed: int, *, dtype: str, rules: Rules = AS_HELD, kind=Frozen, host_embedding=False
) -> LoadedModel:
    """A decoder with random weights, for benchmarks and for training from scratch."""
    read = random_read(config, seed)
    model = build_model(config, read, dtype=dtype, rules=rules, kind=kind, host_embedding=host_embedding)
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
    config, tensors = read_with_tensors(folder)
    tensors = open_tensors(folder) if tensors is None else tensors
    if config.tie_embeddings:
        read_head_as_embedding(tensors, config.names)
    check_names(config, tensors)
    return config, tensors


def check_names(config: ModelConfig, tensors: TensorFolder) -> None:
    """Refuses a checkpoint that lacks a parameter or holds one that the decoder would ignore."""
    wanted = set(checkpoint(config))
    foreign = quantized_names(tensors.names)
    if foreign:
        raise NotImplementedError(f"{tensors.folder} is quantized with {foreign}, which is not read: {ORIGINAL}")
    missing = sorted(wanted - tensors.names)
    if missing:
        why = " (config.json has tie_word_embeddings=false: it must be there)" if missing == [config.names.head] else ""
        raise ValueError(f"{tensors.folder} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]!r} first{why}")
    extra = sorted(name for name in tensors.names - wanted if not _harmless(name, config, wanted))
    if extra:
        raise ValueError(
            f"{tensors.folder} holds {len(extra)} tensors that no {config.family} decoder has: {', '.join(extra[:8])}"
        )


def other_parts(config: ModelConfig, tensors: TensorFolder) -> list[str]:
    """The tensors of other parts of the model, which are not read."""
    wanted = set(checkpoint(config))
    return [name for name in tensors.names - wanted if config.names.passes(name)]


def _harmless(name: str, config: ModelConfig, wanted: set[str]) -> bool:
    """Whether a tensor can be left unread: derived frequencies, the tied head's copy, a packed weight's scales.

    That a tied head is a copy was looked at when the configuration was read: with another one it is not tied.
    """
    tied = name == config.names.head and config.tie_embeddings
    scales = any(name.rsplit(".", dots)[0] in wanted for dots in (1, 2))
    return tied or scales or config.names.passes(name) or name.endswith("rotary_emb.inv_freq")


class _Source:
    """Reads a folder's arrays for the decoder, and tells the identity what it reads.

    The tensor that was read last is kept: of one that holds all experts of a layer, each is an array.
    """

    def __init__(self, tensors: TensorFolder, identity: BaseIdentity, rules: Rules):
        self.tensors, self.identity, self.rules = tensors, identity, rules
        self._last: tuple[str, Any] = "", None

    def read(self, tensor: Tensor) -> Any:
        """An array of a parameter, packed where the folder holds it so and the rules keep it."""
        return tensor.gathered(lambda part: self._part(part, self.rules.unpacks(expert=tensor.param.role == "expert")))

    def _part(self, part: Part, unpack: bool) -> Any:
        if self._last[0] != part.name:
            self._last = part.name, _whole(self.tensors, part, self.identity)
        value = part.of(self._last[1])
        return dequantized(value) if unpack else value


def _whole(tensors: TensorFolder, part: Part, identity: BaseIdentity) -> Any:
    """A checkpoint's tensor, packed or an array."""
    name, shape = part.name, part.whole
    raw, reader = identity.read(name), reader_of(tensors, name)
    if reader is not None:
        return reader.read(tensors, name, shape)
    if tensors.dtype(name) not in FLOATS or raw.shape != shape:
        raise ValueError(
            f"{tensors.file(name)}: {name!r} is {tensors.dtype(name)} {raw.shape}, expected {'/'.join(FLOATS)} {shape}"
        )
    return raw
