"""From a model folder and a folder of adapters to an engine."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from qlora_jax import kernels
from qlora_jax.config import QuantSection
from qlora_jax.io.hf import LoadedModel, load_model, read_config
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.adapters import packed_projection
from qlora_jax.models.config import DTYPES
from qlora_jax.quant.rules import rules_for
from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.reading import Limits
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.sizes import Base, EngineOptions

MEGABYTE = 10**6


def open_engine(
    model: Path, adapters: Path | None, *, base_name: str, stop_ids: Sequence[int], **options: Any
) -> Engine:
    """An engine that has not been started.

    Args:
      model: a folder with a Hugging Face model (`io.hf.resolve_folder` gives that of a Hub name).
      adapters: a folder whose subfolders are adapters; None for none.
      base_name: what requests call the model.
      stop_ids: tokens that end a text.
      options: the fields of EngineOptions, such as quant="nf4", slots=16.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: with the name of what is missing, wrong or unsupported.
    """
    return engine_of(model, adapters, EngineOptions(**options), base_name=base_name, stop_ids=stop_ids)


def engine_of(
    model: Path, adapters: Path | None, chosen: EngineOptions, *, base_name: str, stop_ids: Sequence[int]
) -> Engine:
    """`open_engine` for options that are put together."""
    kernels.available(DTYPES[chosen.dtype])
    sizes = dataclasses.replace(chosen, max_length=min(chosen.max_length, read_config(model).max_position))
    loaded = load_model(model, dtype=DTYPES[chosen.dtype], rules=rules_for(chosen.quant, chosen.quantization))
    limits = Limits(
        config=loaded.model.config,
        rank=sizes.max_rank,
        expert_rank=sizes.max_expert_rank,
        nbytes=sizes.max_adapter_mb * MEGABYTE,
        dtype=DTYPES[chosen.dtype],
        base_hash=loaded.content_hash,
        quantization=stored(loaded, chosen.quantization),
        base=TensorFolder(model),
    )
    graphdef, state = nnx.split(loaded.model)
    base = Base(graphdef, (state,), loaded.model.config, base_name, stop_ids)
    return Engine(base, AdapterStore(adapters, limits, host=sizes.host_adapters, base=base_name), sizes)


def stored(loaded: LoadedModel, quantization: QuantSection | None) -> QuantSection | None:
    """How the base's weights are stored; None where they are not packed."""
    packed = packed_projection(loaded.model)
    if packed is None:
        return None
    return quantization or QuantSection(double=packed.double)
