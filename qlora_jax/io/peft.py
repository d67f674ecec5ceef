"""Adapters in PEFT's folder format: writing, reading, and putting one on a decoder."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qlora_jax.config import LoraSection
from qlora_jax.io.adapter import Adapter, check_base, fitted
from qlora_jax.io.chat_template import FILES, Templates, read_chat_template, write_chat_template
from qlora_jax.io.folder import new_folder
from qlora_jax.io.foreign import adapter_elsewhere
from qlora_jax.io.identity import RECORD, sample_record
from qlora_jax.io.model_card import adapter_card
from qlora_jax.io.peft_config import CONFIG, from_peft, read_settings, targets_of, to_peft, variant_of
from qlora_jax.io.peft_experts import by_module, in_file, unflattened
from qlora_jax.io.peft_keys import keys_of, parts_of
from qlora_jax.io.record import read_record
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.shards import write_safetensors
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.lora.kinds import KINDS
from qlora_jax.lora.targets import OUTPUT_LAYER
from qlora_jax.models.adapters import linears, shape_of
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.params import Param
from qlora_jax.models.table import adaptable, linear_modules

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CARD = "README.md"
OWN = (CONFIG, WEIGHTS, CARD, RECORD, *FILES)  # what an adapter folder of ours may hold


class TrainedOn(NamedTuple):
    """The base of an adapter that is written.

    Attributes:
      name: a name on the Hub, or a path.
      content_hash: of its weights; None where it is not known.
      extra: what else is recorded, such as how it was stored.
    """

    name: str
    content_hash: str | None = None
    extra: Mapping[str, Any] = MappingProxyType({})


def write_adapter(
    folder: str | Path,
    model: Decoder,
    lora: LoraSection,
    targets: dict[str, Target],
    base: TrainedOn,
    chat_template: Templates | None = None,
) -> None:
    """Writes the adapter of `model` as a folder that PEFT loads, in place of one that is there already.

    Args:
      targets: the adapted modules, as `add_adapters` and `attach_adapter` return them.
      base: what it was trained on: the name goes into base_model_name_or_path, the rest into qlora_jax.json.
      chat_template: what chats were rendered with; None where there was no template.

    Raises:
      FileExistsError: the folder holds anything but an adapter.
      ValueError: `targets` are not the modules that have an adapter.
    """
    weights = in_file(_adapter_weights(model, targets))
    kind = KINDS[lora.variant].linear
    tensors = {key: value for name, parts in weights.items() for key, value in keys_of(name, parts, kind).items()}
    settings = to_peft(lora, targets, linear_modules(model.config), base.name)
    needed = sum(value.nbytes for value in tensors.values())
    parameters = sum(value.size for value in tensors.values())
    with new_folder(folder, needed=needed, replaceable=OWN) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        _write_json(partial / CONFIG, settings)
        _write_json(
            partial / RECORD, {"base_hash": base.content_hash, **sample_record(base.content_hash), **base.extra}
        )
        (partial / CARD).write_text(adapter_card(lora, base.name, parameters))
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
    kind = KINDS[variant_of(settings)].linear
    file = folder / WEIGHTS
    held = by_module(file, parts_of(file, _load(file), base, kind), settings.get("target_parameters") or ())
    if not targets_of(settings, list(held)):
        raise _uncovered(folder, min(held))
    lora = from_peft(settings, list(held))
    weights = unflattened(file, held, resolve_targets(lora, list(held)))
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
    adapter = fitted(adapter, model.config)
    targets = adapter.targets
    if OUTPUT_LAYER in targets and model.lm_head is None:
        model.untie()
    for path, linear in linears(model):
        param = adaptable(model.config)[path]
        adapted = any(module in targets for module in param.modules)
        linear.lora = _stacked(adapter, param) if adapted else None
    return targets


def _adapter_weights(model: Decoder, targets: Mapping[str, Target]) -> dict[str, Any]:
    """The arrays of each adapted module, without the zeros that pad unequal ranks."""
    found = {}
    for path, linear in linears(model):
        param = adaptable(model.config)[path]
        if linear.lora is None:
            continue
        for layer, module in enumerate(param.modules):
            if module in targets:
                found[module] = linear.lora.parts(layer if param.layers else None, targets[module].rank)
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


def _check_ranks(folder: Path, lora: LoraSection, weights: Mapping[str, Any]) -> None:
    """Every module's shapes against the rank that the configuration gives it."""
    targets = resolve_targets(lora, list(weights))
    for name, parts in weights.items():
        if name not in targets:
            raise _uncovered(folder, name)
        rank, A, B = targets[name].rank, parts.A, parts.B
        if (A.shape[-2], B.shape[-1]) != (rank, rank):
            raise ValueError(
                f"{folder}: {name!r} has A {A.shape} and B {B.shape}, but {CONFIG} gives it rank {rank}: "
                f"save the adapter again"
            )


def _uncovered(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"{folder}: {WEIGHTS} has weights for {name!r}, which target_modules in {CONFIG} does not cover: save the "
        f"adapter again"
    )


def _stacked(adapter: Adapter, param: Param) -> Any:
    """One layer's adapter, or those of a stack padded with zeros to the largest rank."""
    kind, (parts, scale) = adapter.kind.of(param.experts), adapter.on(param)
    if not param.layers:
        return kind.of(parts[0], scale[0], adapter.lora.dropout)
    used = [one for one in parts if one is not None]
    shape = shape_of(param, max(one.A.shape[-2] for one in used))
    dtype = np.result_type(*(array for one in used for array in one))
    return kind.of(kind.stacked(parts, shape, dtype), scale, adapter.lora.dropout)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
