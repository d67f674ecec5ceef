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

from qlora_jax.config import QuantSection
from qlora_jax.io.adapter import Adapter, check_base, fitted
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.companions import write_companions
from qlora_jax.io.folder import new_folder
from qlora_jax.io.hf import FLOATS, open_folder, other_parts
from qlora_jax.io.identity import BaseIdentity
from qlora_jax.io.model_card import model_card
from qlora_jax.io.packed import Reader, reader_of
from qlora_jax.io.safetensors import DTYPES, TensorFolder
from qlora_jax.io.shards import SHARD_BYTES, write_shards
from qlora_jax.lora import Target
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Part, Tensor
from qlora_jax.models.storing import check_storage, format_of
from qlora_jax.models.table import checkpoint, joined
from qlora_jax.quant.packed import EXPERT, dequantized
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
      parts: of our model's arrays that it holds; more than one where it holds those of all experts.
      dtype: of its values; of what it is dequantized to where the folder holds it packed.
    """

    name: str
    parts: list[Part]
    dtype: str
    reader: Reader | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].whole

    @property
    def projection(self) -> bool:
        """Whether it is of decoder projections."""
        return self.parts[0].tensor.param.projection

    @property
    def of_experts(self) -> bool:
        """Whether it is an expert's, or that of all experts of a layer."""
        return self.parts[0].tensor.param.experts > 0


@dataclass(frozen=True)
class Base:
    """An opened base folder and the adapter that goes on it.

    Attributes:
      passed: tensors of other parts of the model, such as a tower for images, which are written as they are.
    """

    folder: Path
    config: ModelConfig
    tensors: TensorFolder
    weights: list[Weight]
    adapter: Adapter | None
    targets: dict[str, Target]
    passed: list[str]

    @property
    def passed_bytes(self) -> int:
        """Of the tensors that are passed on as they are."""
        return sum(self.tensors.nbytes(name) for name in self.passed)

    @functools.cached_property
    def packed(self) -> str | None:
        """The name of a projection that the folder holds in 4 bits; the others stay as they are then.

        Not of experts whose format says nothing of the others: those weights are the model's original ones.
        """
        held = (w for w in self.weights if w.reader and not w.reader.experts_only)
        return next((w.name for w in held if w.projection), None)


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
    base = open_base(Path(base_folder), adapter)
    if base.packed and into == "original":
        raise ValueError(
            f"{base.folder} holds {base.packed!r} in 4 bits, not its original: give the folder of the original weights "
            f"(--model), or merge into 'dequantized' (--merge-into)"
        )
    used = rules if into == "dequantized" else None
    if used:
        check_storage(base.config, used, host_embedding=False)

    def convert(weight: Weight, value: Any) -> dict[str, np.ndarray]:
        return {weight.name: merged(base, weight, value, used, dtype or weight.dtype)}

    needed = sum(math.prod(w.shape) * jnp.dtype(dtype or w.dtype).itemsize for w in base.weights) + base.passed_bytes
    card = model_card("Merged model", base_id(base), f"A LoRA adapter is {MERGES[into]}.")
    written = dtype or dtype_of(base)
    with new_folder(out, needed=needed) as partial:
        write_weights(base, partial, convert, shard_bytes)
        template, tied = chat_template_of(base), base.config.tie_embeddings
        write_companions(base.folder, partial, dtype=written, tied=tied, chat_template=template)
        (partial / "README.md").write_text(card)


def open_base(folder: Path, adapter: Adapter | None) -> Base:
    config, tensors = open_folder(folder)
    if adapter:
        adapter = fitted(adapter, config)
        if OUTPUT_LAYER in adapter.weights and config.tie_embeddings:
            config = dataclasses.replace(config, tie_embeddings=False)
            tensors.copy(config.names.embedding, config.names.head)
    weights = [_weight(tensors, name, parts) for name, parts in checkpoint(config).items()]
    whole = next((w.dtype for w in weights if w.projection and w.reader is None), None)
    # What a format holds experts in says nothing of what they are written in.
    weights = [
        dataclasses.replace(w, dtype=whole) if whole and w.reader and w.reader.experts_only else w for w in weights
    ]
    weights.sort(key=lambda w: (tensors.file(w.name), w.name))
    targets = adapter.targets if adapter else {}
    passed = sorted(other_parts(config, tensors), key=lambda name: (tensors.file(name), name))
    return Base(folder, config, tensors, weights, adapter, targets, passed)


def _weight(tensors: TensorFolder, name: str, parts: list[Part]) -> Weight:
    expected, reader = parts[0].whole, reader_of(tensors, name)
    if reader is not None:
        return Weight(name, parts, reader.form(tensors, name, expected)[1], reader)
    dtype, shape = tensors.dtype(name), tensors.shape(name)
    if dtype not in FLOATS or shape != expected:
        raise ValueError(f"{tensors.file(name)}: {name!r} is {dtype} {shape}, expected {'/'.join(FLOATS)} {expected}")
    # Nothing is computed in 64 bits, so nothing is written in them.
    return Weight(name, parts, "float32" if dtype == "F64" else str(np.dtype(DTYPES[dtype])), None)


def write_weights(base: Base, folder: Path, convert: Callable, shard_bytes: int) -> str:
    """Writes every weight as `convert` gives it and returns the base's identity."""
    identity = BaseIdentity(base.tensors)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for weight in base.weights:
            raw = identity.read(weight.name)
            value = weight.reader.read(base.tensors, weight.name, weight.shape) if weight.reader else raw
            yield from convert(weight, value).items()
        for name in base.passed:
            yield name, base.tensors.read(name)

    write_shards(folder, tensors(), shard_bytes)
    # The hash is known once everything has been read; the folder is not in its place before.
    if base.adapter:
        check_base(base.adapter, identity.hexdigest())
    return identity.hexdigest()


def merged(base: Base, weight: Weight, value: Any, rules: Rules | None, dtype: str) -> np.ndarray:
    """The weight to write, in `dtype`, from what the folder holds; with `rules` as it is once stored so."""
    held = weight.reader is not None and not (rules and rules.unpacks(expert=weight.reader.experts_only))
    kept = held or (weight.projection and base.packed is not None)
    read, values = reading(base, weight, value), []
    for part in weight.parts:
        own = read(part)
        if rules is not None and not kept:
            # Rows are quantized with those that lie beside them in the same array, wherever files keep them.
            own = _as_stored(part.tensor.gathered(read), part.tensor, rules, dtype)[part.rows]
        values.append(with_adapter(base, part, own).astype(dtype))
    return joined(weight.parts, values)


def reading(base: Base, weight: Weight, value: Any) -> Callable[[Part], np.ndarray]:
    """What gives a part of an array unpacked: of `weight` from its `value`, else from the part's own file."""

    def read(part: Part) -> np.ndarray:
        return np.asarray(dequantized(part.of(value if part.name == weight.name else base.tensors.read(part.name))))

    return read


def _as_stored(value: np.ndarray, tensor: Tensor, rules: Rules, dtype: str) -> np.ndarray:
    """What is left of a weight that was stored from `dtype`."""
    return np.asarray(dequantized(format_of(tensor.param, rules).quantize(jnp.asarray(value.astype(dtype)))))


def with_adapter(base: Base, part: Part, value: np.ndarray) -> np.ndarray:
    """A part of an array with the part of its adapter that belongs to it, where it has one."""
    tensor = part.tensor
    target = base.targets.get(tensor.module) if tensor.param.adaptable else None
    if base.adapter is None or target is None:
        return value
    kind, parts = base.adapter.kind.of(tensor.param.experts), base.adapter.weights[tensor.module]
    expert = tensor.numbers.get(EXPERT, 0)
    return kind.merge(value.astype(np.float32), parts, target.scale, part.rows, expert)


def dtype_of(base: Base) -> str:
    """The dtype that config.json names: that of the projections."""
    return next(w.dtype for w in base.weights if w.projection)


def chat_template_of(base: Base) -> Templates | None:
    """What the adapter was trained with; None keeps the base's."""
    return base.adapter.chat_template if base.adapter else None


def base_id(base: Base) -> str:
    """The base as its adapter names it, else its folder."""
    return (base.adapter and base.adapter.base) or str(base.folder)
