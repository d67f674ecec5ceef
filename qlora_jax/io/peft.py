"""Adapters in PEFT's folder format: writing, reading, and putting one on a decoder."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qlora_jax.io.chat_template import FILES, Templates, read_chat_template, write_chat_template
from qlora_jax.io.folder import new_folder
from qlora_jax.io.foreign import adapter_elsewhere
from qlora_jax.io.identity import RECORD, SAMPLE, BaseHash, sample_record
from qlora_jax.io.model_card import adapter_card
from qlora_jax.io.peft_config import CONFIG, from_peft, read_settings, to_peft
from qlora_jax.io.peft_keys import PREFIX, Pair, pairs
from qlora_jax.io.record import read_record
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.shards import write_safetensors
from qlora_jax.lora import LoRA, LoraConfig, Target, resolve_targets
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.adapters import linears, module_names
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import STACK, hf_name, linear_modules, parameter_specs

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CARD = "README.md"
OWN = (CONFIG, WEIGHTS, CARD, RECORD, *FILES)  # what an adapter folder of ours may hold


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter on its own.

    Attributes:
      lora: how it was made; `lora.targets` as its folder says it.
      weights: A `[r, K]` and B `[N, r]` of each adapted module by path: float32, bfloat16 or float16, finite.
      base: the model that it was trained on, a Hub name or a path; None where the folder does not say.
      base_hash: that model's content hash; None in folders that PEFT wrote.
      extra: what else was recorded beside it, such as how the base was quantized.
      chat_template: those in its folder, which it was trained with; None leaves the base's.
    """

    lora: LoraConfig
    weights: Mapping[str, Pair]
    base: str | None
    base_hash: str | None
    extra: Mapping[str, Any]
    chat_template: Templates | None = None

    @property
    def targets(self) -> dict[str, Target]:
        """Rank and scale of each adapted module."""
        return resolve_targets(self.lora, list(self.weights))


def write_adapter(
    folder: str | Path,
    model: Decoder,
    lora: LoraConfig,
    targets: dict[str, Target],
    *,
    base: str,
    base_hash: str | None,
    extra: Mapping[str, Any] | None = None,
    chat_template: Templates | None = None,
) -> None:
    """Writes the adapter of `model` as a folder that PEFT loads, in place of one that is there already.

    Args:
      targets: the adapted modules, as `add_adapters` and `attach_adapter` return them.
      base: name or path of the base model, for base_model_name_or_path.
      base_hash: its content hash; recorded in qlora_jax.json together with `extra`.
      chat_template: what chats were rendered with; None where there was no template.

    Raises:
      FileExistsError: the folder holds anything but an adapter.
      ValueError: `targets` are not the modules that have an adapter.
    """
    weights = _adapter_weights(model, targets)
    tensors = {
        f"{PREFIX}{name}.lora_{matrix}.weight": value
        for name, pair in weights.items()
        for matrix, value in zip("AB", pair, strict=True)
    }
    settings = to_peft(lora, targets, linear_modules(model.config), base)
    needed = sum(value.nbytes for value in tensors.values())
    parameters = sum(value.size for value in tensors.values())
    with new_folder(folder, needed=needed, replaceable=OWN) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        _write_json(partial / CONFIG, settings)
        _write_json(partial / RECORD, {"base_hash": base_hash, **sample_record(base_hash), **(extra or {})})
        (partial / CARD).write_text(adapter_card(lora, base, parameters))
        if chat_template is not None:
            write_chat_template(partial, chat_template)


def read_adapter(folder: str | Path, base: TensorFolder | None = None) -> Adapter:
    """Reads an adapter folder of PEFT's or of `write_adapter`.

    Args:
      base: the tensors of its base. With them, whole layers that PEFT saved beside A and B may be there if they are the
        base's own.

    Raises:
      FileNotFoundError: no such folder, or a file of it is absent.
      ValueError: pickled, damaged or non-finite weights, or shapes that do not fit the configuration's ranks.
      NotImplementedError: another method than LoRA and rsLoRA on linear layers.
    """
    folder = Path(folder)
    _check_files(folder)
    settings = read_settings(folder / CONFIG)
    weights = pairs(folder / WEIGHTS, _load(folder / WEIGHTS), base)
    lora = from_peft(settings, list(weights))
    _check_ranks(folder, lora, weights)
    record = read_record(folder / RECORD) if (folder / RECORD).exists() else {}
    base_hash = record.pop("base_hash", None)
    base = settings.get("base_model_name_or_path")
    return Adapter(
        lora=lora,
        weights=weights,
        base=base,
        base_hash=base_hash,
        extra=record,
        chat_template=read_chat_template(folder),
    )


def attach_adapter(model: Decoder, adapter: Adapter, *, base_hash: str | None) -> dict[str, Target]:
    """Gives the linear layers of `model` the adapter, in place of any that they have.

    Args:
      base_hash: content hash of the model's weights; None leaves it unchecked.

    Returns:
      The adapted modules by Hugging Face path, with rank and scale.

    Raises:
      ValueError: an adapter for another base, or one that does not fit; the model is then unchanged.
    """
    check_base(adapter, base_hash)
    check_fits(adapter, model.config)
    targets = adapter.targets
    if OUTPUT_LAYER in targets and model.lm_head is None:
        model.untie()
    for path, linear in linears(model):
        own = {name: targets[name] for name in module_names(model.config, path) if name in targets}
        linear.lora = _stacked(adapter, model.config, path, own) if own else None
    return targets


def check_base(adapter: Adapter, base_hash: str | None) -> None:
    """Refuses an adapter that records another base than the one with this content hash. Raises ValueError.

    The same base in another 16- or 32-bit dtype is no other one, nor is the original of a base in 4 bits.
    """
    sample = adapter.extra.get(SAMPLE)
    if isinstance(base_hash, BaseHash) and isinstance(sample, str) and base_hash.holds(sample):
        return
    if None not in (adapter.base_hash, base_hash) and adapter.base_hash != base_hash:
        raise ValueError(
            f"adapter for another base: it was trained on {adapter.base!r} with content hash "
            f"{adapter.base_hash}, this base has {base_hash}: give the base it was trained on (or delete its "
            f"{RECORD} to skip this check)"
        )


def check_fits(adapter: Adapter, config: ModelConfig) -> None:
    """Refuses an adapter whose modules or shapes are not the model's. Raises ValueError.

    Of a model whose embedding is its output layer, too, the output layer alone may be adapted, as in PEFT.
    """
    modules = linear_modules(config)
    layers, specs = range(config.num_layers), parameter_specs(dataclasses.replace(config, tie_embeddings=False))
    shapes = {hf_name(path, layer): spec.shape for path, spec in specs.items() for layer in layers}
    for name, (A, B) in adapter.weights.items():
        if name not in modules and name != OUTPUT_LAYER:
            why = " (it was trained on the model without its output layer)" if f"model.{name}" in modules else ""
            raise ValueError(
                f"the adapter has weights for {name!r}{why}, which this {config.family} model of "
                f"{config.num_layers} layers lacks: give the adapter's own base"
            )
        n, k = shapes[f"{name}.weight"]
        for matrix, got, want in (("A", A, (A.shape[0], k)), ("B", B, (n, A.shape[0]))):
            if got.shape != want:
                raise ValueError(
                    f"lora_{matrix} of {name!r} is {got.shape}, this model needs {want}: give the adapter's own base"
                )
    resolved = resolve_targets(adapter.lora, sorted({*modules, *adapter.weights}))
    absent = sorted(resolved.keys() - adapter.weights.keys())
    if absent:
        raise ValueError(
            f"the adapter's target_modules cover {absent[0]!r}, for which it has no weights: save the adapter again"
        )


def _adapter_weights(model: Decoder, targets: Mapping[str, Target]) -> dict[str, Pair]:
    """A and B of each adapted module, without the zeros that pad unequal ranks."""
    found = {}
    for path, linear in linears(model):
        if linear.lora is None:
            continue
        A, B = np.asarray(linear.lora.A.get_value()), np.asarray(linear.lora.B.get_value())
        for layer, name in enumerate(module_names(model.config, path)):
            if name in targets:
                rank = targets[name].rank
                a, b = (A[layer], B[layer]) if path.startswith(STACK) else (A, B)
                found[name] = (a[:rank], b[:, :rank])
    if found.keys() != targets.keys():
        absent = sorted(targets.keys() - found.keys())
        raise ValueError(f"targets name {absent[0]!r}, which has no adapter: pass what add_adapters returned")
    return found


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one with an adapter of PEFT's or qlora-jax's")
    elsewhere = None if (folder / WEIGHTS).exists() else adapter_elsewhere(folder)
    if elsewhere:
        raise ValueError(elsewhere)
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run code when it is read: save the adapter again as "
            f"{WEIGHTS} (save_pretrained with safe_serialization=True)"
        )
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} holds no {file}: give a folder with an adapter of PEFT's or qlora-jax's")


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors file ({error}): copy it again"
        ) from error


def _check_ranks(folder: Path, lora: LoraConfig, weights: Mapping[str, Pair]) -> None:
    """Every module's shapes against the rank that the configuration gives it."""
    targets = resolve_targets(lora, list(weights)) if lora.targets else {}
    for name, (A, B) in weights.items():
        if name not in targets:
            raise ValueError(
                f"{folder}: {WEIGHTS} has weights for {name!r}, which target_modules in {CONFIG} does not "
                f"cover: save the adapter again"
            )
        rank = targets[name].rank
        if (A.shape[0], B.shape[1]) != (rank, rank):
            raise ValueError(
                f"{folder}: {name!r} has A {A.shape} and B {B.shape}, but {CONFIG} gives it rank {rank}: "
                f"save the adapter again"
            )


def _stacked(adapter: Adapter, config: ModelConfig, path: str, own: Mapping[str, Target]) -> LoRA:
    """One layer's adapter, or those of a stack padded with zeros to the largest rank."""
    names = module_names(config, path)
    n, k = parameter_specs(config)[f"{path}.weight"].shape
    rank = max(target.rank for target in own.values())
    dtype = np.result_type(*(matrix for name in own for matrix in adapter.weights[name]))
    A, B = np.zeros((len(names), rank, k), dtype), np.zeros((len(names), n, rank), dtype)
    scale = np.zeros(len(names), np.float32)
    for layer, name in enumerate(names):
        if name in own:
            a, b = adapter.weights[name]
            A[layer, : len(a)], B[layer, :, : len(a)], scale[layer] = a, b, own[name].scale
    A, B, scale = (A, B, scale) if path.startswith(STACK) else (A[0], B[0], scale[0])
    return LoRA(jnp.asarray(A), jnp.asarray(B), jnp.asarray(scale), adapter.lora.dropout)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
