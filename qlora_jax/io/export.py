"""A base model's folder, with or without an adapter, as a new Hugging Face folder; one tensor at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import QuantSection
from qlora_jax.io import bitsandbytes
from qlora_jax.io.adapter import Adapter, check_base, check_fits
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.companions import write_companions
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import FLOATS, open_folder
from qlora_jax.io.identity import BaseIdentity, record_source
from qlora_jax.io.model_card import model_card
from qlora_jax.io.packed import Reader, reader_of
from qlora_jax.io.safetensors import DTYPES, TensorFolder
from qlora_jax.io.shards import SHARD_BYTES, write_shards
from qlora_jax.io.tied import EMBEDDING, HEAD
from qlora_jax.lora import Target
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.storing import check_storage, format_of
from qlora_jax.models.table import Tensor, checkpoint, joined
from qlora_jax.quant.formats import NF4
from qlora_jax.quant.packed import dequantized
from qlora_jax.quant.rules import Rules, packed

DEFAULT = packed(QuantSection())
MERGES = {
    "original": "added to the original weights",
    "dequantized": "added to the weights after NF4 quantization and back, which are those it was trained on",
}


@dataclass(frozen=True)
class Weight:
    """One tensor of the base folder.

    Attributes:
      parts: the arrays of our model that it holds, more than one where it fuses several.
      dtype: of its values; of what it is dequantized to where the folder holds it packed.
    """

    name: str
    parts: list[Tensor]
    dtype: str
    reader: Reader | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].whole

    @property
    def projection(self) -> bool:
        """Whether it is of decoder projections."""
        return self.parts[0].param.projection


@dataclass(frozen=True)
class Base:
    """An opened base folder and the adapter that goes on it."""

    folder: Path
    config: ModelConfig
    tensors: TensorFolder
    weights: list[Weight]
    adapter: Adapter | None
    targets: dict[str, Target]

    @functools.cached_property
    def packed(self) -> str | None:
        """The name of a projection that the folder holds in 4 bits; the others stay as they are then."""
        return next((w.name for w in self.weights if w.reader and w.projection), None)


def export_merged(
    base_folder: str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    into: str = "original",
    rules: Rules = DEFAULT,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base with the adapter added into its weights: a 16-bit model that needs no adapter.

    W + scale · B·A is added in float32 and cast once. Holds one shard's tensors in memory.

    Args:
      into: which W: "original", the folder's weights; or "dequantized", those that QLoRA training saw: every
        decoder projection, adapted or not, quantized to NF4 and back (or as a 4-bit folder holds it), and the
        embedding and output layer as `rules` store them.
      rules: how training stored the base; for "dequantized".
      dtype: of everything written; each tensor's own where None. "dequantized" casts before it quantizes, as
        loading for training does.

    Raises:
      ValueError: another `into`, a packed base with "original", or an adapter for another base.
      OSError: `out` is not empty, or the disk is full; nothing is left half-written.
    """
    if into not in MERGES:
        raise ValueError(f"into={into!r}: expected one of {', '.join(MERGES)}")
    base = _open(Path(base_folder), adapter)
    if base.packed and into == "original":
        raise ValueError(
            f"{base.folder} holds {base.packed!r} in 4 bits, not its original: give the folder of the original weights "
            f"(--model), or merge into 'dequantized' (--merge-into)"
        )
    used = rules if into == "dequantized" else None
    if used:
        check_storage(base.config, used, host_embedding=False)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        return {weight.name: _merged(base, weight, value, used, dtype or weight.dtype)}

    needed = sum(math.prod(w.shape) * jnp.dtype(dtype or w.dtype).itemsize for w in base.weights)
    card = model_card("Merged model", _base_id(base), f"A LoRA adapter is {MERGES[into]}.")
    written = dtype or _dtype(base)
    with new_folder(out, needed=needed) as partial:
        _write(base, partial, convert, shard_bytes)
        template, tied = _chat_template(base), base.config.tie_embeddings
        write_companions(base.folder, partial, dtype=written, tied=tied, chat_template=template)
        (partial / "README.md").write_text(card)


def export_bnb4(
    base_folder: str | Path,
    out: str | Path,
    adapter: Adapter | None = None,
    *,
    double: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base in bitsandbytes' 4-bit format: every decoder projection in NF4, the rest unpacked.

    What is not packed is written in the projections' dtype: transformers keeps the dtypes of such a folder, and does
    not run a model of several.

    The embedding and the output layer stay unpacked whatever quant.embedding and quant.lm_head were in training:
    transformers loads them in no other way from such a folder.

    With an adapter, it is added into the original weights first; quantizing the sum then loses part of it.
    Serve the 4-bit base and the adapter side by side where that matters.

    Raises:
      ValueError: a base that is packed already, or an adapter for another base.
      OSError: `out` is not empty, or the disk is full; nothing is left half-written.
    """
    base = _open(Path(base_folder), adapter)
    if base.packed:
        raise ValueError(f"{base.folder} holds 4-bit weights already: give the folder of the original weights")

    dtype, packing = _dtype(base), NF4(double)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        value = _merged(base, weight, value, None, weight.dtype if weight.projection else dtype)
        if not weight.projection:
            return {weight.name: value}
        return bitsandbytes.write(weight.name, packing.quantize(jnp.asarray(value)))

    needed = sum(_packed_bytes(w, packing, dtype) for w in base.weights)
    text = f"Its linear layers are in NF4{' with double quantization' if double else ''} for bitsandbytes."
    if adapter:
        text += f" A LoRA adapter was {MERGES['original']} before they were quantized."
    with new_folder(out, needed=needed) as partial:
        identity = _write(base, partial, convert, shard_bytes)
        if adapter is None:
            record_source(partial, identity)
        card = model_card("4-bit model", _base_id(base), text, tags=("bitsandbytes", "4-bit"))
        settings = bitsandbytes.quantization_config(double=double, dtype=dtype)
        template, tied = _chat_template(base), base.config.tie_embeddings
        write_companions(base.folder, partial, dtype=dtype, tied=tied, quantization=settings, chat_template=template)
        (partial / "README.md").write_text(card)


def _open(folder: Path, adapter: Adapter | None) -> Base:
    config, tensors = open_folder(folder)
    if adapter:
        check_fits(adapter, config)
        if OUTPUT_LAYER in adapter.weights and config.tie_embeddings:
            config = dataclasses.replace(config, tie_embeddings=False)
            tensors.copy(EMBEDDING, HEAD)
    weights = [_weight(tensors, name, parts) for name, parts in checkpoint(config).items()]
    weights.sort(key=lambda w: (tensors.file(w.name), w.name))
    return Base(folder, config, tensors, weights, adapter, adapter.targets if adapter else {})


def _weight(tensors: TensorFolder, name: str, parts: list[Tensor]) -> Weight:
    expected, reader = parts[0].whole, reader_of(tensors, name)
    if reader is not None:
        return Weight(name, parts, reader.form(tensors, name, expected)[1], reader)
    dtype, shape = tensors.dtype(name), tensors.shape(name)
    if dtype not in FLOATS or shape != expected:
        raise ValueError(f"{tensors.file(name)}: {name!r} is {dtype} {shape}, expected {'/'.join(FLOATS)} {expected}")
    # Nothing is computed in 64 bits, so nothing is written in them.
    return Weight(name, parts, "float32" if dtype == "F64" else str(np.dtype(DTYPES[dtype])), None)


def _write(base: Base, folder: Path, convert: Callable, shard_bytes: int) -> str:
    """Writes every weight as `convert` gives it and returns the base's identity."""
    identity = BaseIdentity(base.tensors)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for weight in base.weights:
            raw = identity.read(weight.name)
            value = weight.reader.read(base.tensors, weight.name, weight.shape) if weight.reader else raw
            yield from convert(weight, value).items()

    write_shards(folder, tensors(), shard_bytes)
    # The hash is known once everything has been read; the folder is not in its place before.
    if base.adapter:
        check_base(base.adapter, identity.hexdigest())
    return identity.hexdigest()


def _merged(base: Base, weight: Weight, value: Any, rules: Rules | None, dtype: str) -> np.ndarray:
    """The weight to write, in `dtype`, from what the folder holds; with `rules` as it is once stored so."""
    kept = weight.reader is not None or (weight.projection and base.packed is not None)
    whole = dequantized(value)
    parts = [np.asarray(tensor.part_of(whole)) for tensor in weight.parts]
    if rules is not None and not kept:
        parts = [_as_stored(part, tensor, rules, dtype) for part, tensor in zip(parts, weight.parts, strict=True)]
    pairs = zip(parts, weight.parts, strict=True)
    return joined(weight.parts, [_with_adapter(base, tensor, part).astype(dtype) for part, tensor in pairs])


def _as_stored(value: np.ndarray, tensor: Tensor, rules: Rules, dtype: str) -> np.ndarray:
    """What is left of a weight that was stored from `dtype`."""
    return np.asarray(dequantized(format_of(tensor.param, rules).quantize(jnp.asarray(value.astype(dtype)))))


def _with_adapter(base: Base, tensor: Tensor, value: np.ndarray) -> np.ndarray:
    target = base.targets.get(tensor.module) if tensor.param.matrix else None
    if base.adapter is None or target is None:
        return value
    return base.adapter.kind.merge(value.astype(np.float32), base.adapter.weights[tensor.module], target.scale)


def _packed_bytes(weight: Weight, packing: NF4, dtype: str) -> int:
    if weight.projection:
        return packing.shapes(jax.ShapeDtypeStruct(weight.shape, jnp.dtype(weight.dtype))).nbytes
    return math.prod(weight.shape) * jnp.dtype(dtype).itemsize


def _dtype(base: Base) -> str:
    """The dtype that config.json names: that of the projections."""
    return next(w.dtype for w in base.weights if w.projection)


def _chat_template(base: Base) -> Templates | None:
    """What the adapter was trained with; None keeps the base's."""
    return base.adapter.chat_template if base.adapter else None


def _base_id(base: Base) -> str:
    """The base as its adapter names it, else its folder."""
    return (base.adapter and base.adapter.base) or str(base.folder)
