"""A base model's folder, with or without an adapter, as a new Hugging Face folder; one tensor at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.io.bitsandbytes import is_nf4, nf4_form, quantization_config, read_nf4, write_nf4
from qlora_jax.io.build import Quantization, check_storage
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.companions import write_companions
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import FLOATS, open_folder
from qlora_jax.io.identity import BaseIdentity, record_source
from qlora_jax.io.model_card import model_card
from qlora_jax.io.peft import Adapter, check_base, check_fits
from qlora_jax.io.safetensors import DTYPES, TensorFolder
from qlora_jax.io.shards import SHARD_BYTES, write_shards
from qlora_jax.io.tied import EMBEDDING, HEAD
from qlora_jax.lora import Target
from qlora_jax.lora.merge import merged
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import STACK, Spec, hf_name, parameter_specs
from qlora_jax.quant import int8, nf4
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.nf4 import NF4Tensor
from qlora_jax.quant.nf4.tensor import packed_shapes

MERGES = {
    "original": "added to the original weights",
    "dequantized": "added to the weights after NF4 quantization and back, which are those it was trained on",
}


@dataclass(frozen=True)
class Weight:
    """One parameter of the base.

    Attributes:
      path: where it is in our model.
      dtype: of its values; of what it is dequantized to where the folder holds it packed.
    """

    name: str
    path: str
    spec: Spec
    dtype: str
    packed: bool


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
        return next((w.name for w in self.weights if w.packed and w.spec.projection), None)


def export_merged(
    base_folder: str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    into: str = "original",
    quantization: Quantization = Quantization(),  # noqa: B008 (frozen)
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base with the adapter added into its weights: a 16-bit model that needs no adapter.

    W + scale · B·A is added in float32 and cast once. Holds one shard's tensors in memory.

    Args:
      into: which W: "original", the folder's weights; or "dequantized", those that QLoRA training saw: every
        decoder projection, adapted or not, quantized to NF4 and back (or as a 4-bit folder holds it), and the
        embedding and output layer as `quantization` stores them.
      quantization: how training quantized; for "dequantized".
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
    used = quantization if into == "dequantized" else None
    if used:
        check_storage(base.config, used, host_embedding=False)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        return {weight.name: _merged(base, weight, value, used, dtype or weight.dtype)}

    needed = sum(math.prod(w.spec.shape) * jnp.dtype(dtype or w.dtype).itemsize for w in base.weights)
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

    dtype = _dtype(base)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        value = _merged(base, weight, value, None, weight.dtype if weight.spec.projection else dtype)
        if not weight.spec.projection:
            return {weight.name: value}
        return write_nf4(weight.name, nf4.quantize(jnp.asarray(value), double=double))

    needed = sum(_packed_bytes(w, double, dtype) for w in base.weights)
    text = f"Its linear layers are in NF4{' with double quantization' if double else ''} for bitsandbytes."
    if adapter:
        text += f" A LoRA adapter was {MERGES['original']} before they were quantized."
    with new_folder(out, needed=needed) as partial:
        identity = _write(base, partial, convert, shard_bytes)
        if adapter is None:
            record_source(partial, identity)
        card = model_card("4-bit model", _base_id(base), text, tags=("bitsandbytes", "4-bit"))
        packing = quantization_config(double=double, dtype=dtype)
        template, tied = _chat_template(base), base.config.tie_embeddings
        write_companions(base.folder, partial, dtype=dtype, tied=tied, quantization=packing, chat_template=template)
        (partial / "README.md").write_text(card)


def _open(folder: Path, adapter: Adapter | None) -> Base:
    config, tensors = open_folder(folder)
    if adapter:
        check_fits(adapter, config)
        if OUTPUT_LAYER in adapter.weights and config.tie_embeddings:
            config = dataclasses.replace(config, tie_embeddings=False)
            tensors.copy(EMBEDDING, HEAD)
    weights = [
        _weight(tensors, hf_name(path, layer), path, spec)
        for path, spec in parameter_specs(config).items()
        for layer in range(config.num_layers if path.startswith(STACK) else 1)
    ]
    weights.sort(key=lambda w: (tensors.file(w.name), w.name))
    return Base(folder, config, tensors, weights, adapter, adapter.targets if adapter else {})


def _weight(tensors: TensorFolder, name: str, path: str, spec: Spec) -> Weight:
    if is_nf4(tensors, name):
        return Weight(name, path, spec, nf4_form(tensors, name, spec.shape)[1], True)
    dtype, shape = tensors.dtype(name), tensors.shape(name)
    if dtype not in FLOATS or shape != spec.shape:
        raise ValueError(f"{tensors.file(name)}: {name!r} is {dtype} {shape}, expected {'/'.join(FLOATS)} {spec.shape}")
    # Nothing is computed in 64 bits, so nothing is written in them.
    return Weight(name, path, spec, "float32" if dtype == "F64" else str(np.dtype(DTYPES[dtype])), False)


def _write(base: Base, folder: Path, convert: Callable, shard_bytes: int) -> str:
    """Writes every weight as `convert` gives it and returns the base's identity."""
    identity = BaseIdentity(base.tensors)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for weight in base.weights:
            raw = identity.read(weight.name)
            value = read_nf4(base.tensors, weight.name, weight.spec.shape) if weight.packed else raw
            yield from convert(weight, value).items()

    write_shards(folder, tensors(), shard_bytes)
    # The hash is known once everything has been read; the folder is not in its place before.
    if base.adapter:
        check_base(base.adapter, identity.hexdigest())
    return identity.hexdigest()


def _merged(base: Base, weight: Weight, value: Any, quantization: Quantization | None, dtype: str) -> np.ndarray:
    """The weight to write, in `dtype`, from what the folder holds."""
    kept = weight.spec.projection and base.packed is not None
    if quantization and not weight.packed and not kept:
        value = quantization.apply(weight.path, weight.spec, jnp.asarray(value.astype(dtype)))
    if isinstance(value, NF4Tensor):
        value = nf4.dequantize(value)
    if isinstance(value, Int8Tensor):
        value = int8.dequantize(value)
    value = np.asarray(value)
    module = weight.name.removesuffix(".weight")
    if base.adapter and module in base.targets:
        A, B = base.adapter.weights[module]
        value = merged(value.astype(np.float32), A, B, base.targets[module].scale)
    return value.astype(dtype)


def _packed_bytes(weight: Weight, double: bool, dtype: str) -> int:
    if weight.spec.projection:
        return packed_shapes(weight.spec.shape, weight.dtype, double=double).nbytes
    return math.prod(weight.spec.shape) * jnp.dtype(dtype).itemsize


def _dtype(base: Base) -> str:
    """The dtype that config.json names: that of the projections."""
    return next(w.dtype for w in base.weights if w.spec.projection)


def _chat_template(base: Base) -> Templates | None:
    """What the adapter was trained with; None keeps the base's."""
    return base.adapter.chat_template if base.adapter else None


def _base_id(base: Base) -> str:
    """The base as its adapter names it, else its folder."""
    return (base.adapter and base.adapter.base) or str(base.folder)
