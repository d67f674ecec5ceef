"""Adapters with random weights for a model at hand, and what each of them answers by itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import LoraSection, QuantSection
from qlora_jax.generation import Generator
from qlora_jax.io.hf import LoadedModel
from qlora_jax.io.peft import TrainedOn, attach_adapter, read_adapter, write_adapter
from qlora_jax.lora.kinds import KINDS
from qlora_jax.models.adapters import add_adapters, linears, shape_of
from qlora_jax.models.params import Param
from qlora_jax.models.table import adaptable


def write_random_adapter(
    folder: Path, loaded: LoadedModel, seed: int, *, size: float = 0.3, record: Mapping[str, Any] | None = None, **lora
) -> Path:
    """Writes an adapter whose A and B are both N(0, size²), large enough to change answers. The model stays bare.

    Args:
      record: what its folder says of the base's storage, over that of a default NF4 base.
      lora: fields of LoraSection.
    """
    model, config, random = loaded.model, LoraSection(**lora), np.random.default_rng(seed)
    targets = add_adapters(model, config, jax.random.key(seed))
    for _, linear in linears(model):
        for variable in () if linear.lora is None else (linear.lora.A, linear.lora.B):
            drawn = random.standard_normal(variable.get_value().shape, np.float32)
            variable.set_value(jnp.asarray(drawn * np.float32(size)))
    extra = {"method": "qlora", **dataclasses.asdict(QuantSection()), **(record or {})}
    write_adapter(folder, model, config, targets, TrainedOn("random", loaded.content_hash, extra))
    for _, linear in linears(model):
        linear.lora = None
    return folder


def alone(loaded: LoadedModel, adapter: Path | None, rank: int) -> Generator:
    """The base with this one adapter, as generate.py has it; it never stops.

    Adapters are padded with zeros to `rank` and to all layers, so that one program serves them all.
    """
    for _, linear in linears(loaded.model):
        linear.lora = None
    if adapter is not None:
        attach_adapter(loaded.model, read_adapter(adapter), base_hash=loaded.content_hash)
    params = adaptable(loaded.model.config)
    for path, linear in linears(loaded.model):
        if params[path].role != "head":
            linear.lora = _padded(linear.lora, params[path], rank)
    return Generator(*nnx.split(loaded.model), stop_ids=())


def _padded(lora: Any, param: Param, rank: int) -> Any:
    layers, shape = max(len(param.layers), 1), shape_of(param, rank)
    parts, scale = [None] * layers, np.zeros(layers, np.float32)
    if lora is not None:
        each = range(layers) if param.layers else [None]
        parts, scale = [lora.parts(layer, rank) for layer in each], np.reshape(lora.scale.get_value(), layers)
    kind = KINDS["lora"].of(param.experts)
    padded = kind.stacked(parts, shape, np.float32)
    if not param.layers:
        padded, scale = jax.tree.map(lambda a: a[0], padded), scale[0]
    return kind.of(padded, scale, 0.0)
