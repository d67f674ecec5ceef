"""Adapters with random weights for a model at hand, and what each of them answers by itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from qlora_jax.config import LoraSection, QuantSection
from qlora_jax.generation import Generator
from qlora_jax.io.hf import LoadedModel
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.lora import LoRA, Target, resolve_targets
from qlora_jax.models.adapters import linears, projections
from qlora_jax.models.table import Param, adaptable, linear_modules


def write_random_adapter(
    folder: Path, loaded: LoadedModel, seed: int, *, size: float = 0.3, record: Mapping[str, Any] | None = None, **lora
) -> Path:
    """Writes an adapter whose A and B are both N(0, size²), large enough to change answers. The model stays bare.

    Args:
      record: what its folder says of the base's storage, over that of a default NF4 base.
      lora: fields of LoraSection.
    """
    model, config, random = loaded.model, LoraSection(**lora), np.random.default_rng(seed)
    targets = resolve_targets(config, linear_modules(model.config))
    for path, linear in linears(model):
        param = adaptable(model.config)[path]
        own = [targets.get(tensor.module) for tensor in param.tensors()]
        linear.lora = _random_lora(own, param, size, random) if any(own) else None
    extra = {"method": "qlora", **dataclasses.asdict(QuantSection()), **(record or {})}
    write_adapter(folder, model, config, targets, TrainedOn("random", loaded.content_hash, extra))
    for _, linear in linears(model):
        linear.lora = None
    return folder


def _random_lora(targets: list[Target | None], param: Param, size: float, random) -> LoRA:
    n, k = param.shape
    rank = max(target.rank for target in targets if target)
    A = random.standard_normal((len(targets), rank, k), np.float32) * np.float32(size)
    B = random.standard_normal((len(targets), n, rank), np.float32) * np.float32(size)
    scale = np.asarray([target.scale if target else 0 for target in targets], np.float32)
    return LoRA(A, B, scale) if param.stacked else LoRA(A[0], B[0], scale[0])


def alone(loaded: LoadedModel, adapter: Path | None, rank: int) -> Generator:
    """The base with this one adapter, as generate.py has it; it never stops.

    Adapters are padded with zeros to `rank` and to all layers, so that one program serves them all.
    """
    for _, linear in linears(loaded.model):
        linear.lora = None
    if adapter is not None:
        attach_adapter(loaded.model, read_adapter(adapter), base_hash=loaded.content_hash)
    layers = loaded.model.config.num_layers
    for _, linear in projections(loaded.model):
        linear.lora = _padded(linear.lora, linear.weight.get_value().shape[-2:], layers, rank)
    return Generator(*nnx.split(loaded.model), stop_ids=())


def _padded(lora: LoRA | None, shape: tuple[int, int], layers: int, rank: int) -> LoRA:
    n, k = shape
    A, B = np.zeros((layers, rank, k), np.float32), np.zeros((layers, n, rank), np.float32)
    if lora is None:
        return LoRA(A, B, np.zeros(layers, np.float32))
    own = lora.A.get_value().shape[1]
    A[:, :own], B[:, :, :own] = lora.A.get_value(), lora.B.get_value()
    return LoRA(A, B, lora.scale.get_value())
