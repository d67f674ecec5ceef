"""From a model folder and a folder of adapters to an engine."""

from pathlib import Path

from flax import nnx

from qlora_jax import kernels
from qlora_jax.io.build import Quantization
from qlora_jax.io.hf import LoadedModel, load_model, read_config
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.models.adapters import packed_projection
from qlora_jax.models.config import DTYPES
from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.reading import Limits
from qlora_jax.serve.engine import Engine

MEGABYTE = 10**6


def open_engine(
    model: Path,
    adapters: Path | None,
    *,
    base_name: str,
    stop_ids: list[int],
    quant: str = "auto",
    dtype: str = "bf16",
    quantization: Quantization | None = None,
    slots: int = 8,
    max_loras: int = 8,
    max_rank: int = 64,
    max_length: int = 2048,
    queue: int = 64,
    host_adapters: int = 64,
    max_adapter_mb: int = 2048,
) -> Engine:
    """An engine that has not been started.

    Args:
      model: a folder with a Hugging Face model (`io.hf.resolve_folder` gives that of a Hub name).
      adapters: a folder whose subfolders are adapters; None for none.
      quant, dtype: as every command has them: "auto", "none" or "nf4"; a key of DTYPES.
      quantization: how "nf4" packs; the default where None. Adapters trained with another are refused.
      slots, max_loras, max_length, queue: see Engine.
      max_rank: the largest rank of an adapter; each takes the memory of this one on the device.
      host_adapters: how many adapters are kept in host memory.
      max_adapter_mb: the largest file of an adapter's weights, in megabytes.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: with the name of what is missing, wrong or unsupported.
    """
    _check(max_rank=max_rank, host_adapters=host_adapters, max_adapter_mb=max_adapter_mb)
    kernels.available(DTYPES[dtype])
    max_length = min(max_length, read_config(model).max_position)
    loaded = load_model(model, dtype=DTYPES[dtype], quant=quant, quantization=quantization)
    limits = Limits(
        config=loaded.model.config,
        rank=max_rank,
        nbytes=max_adapter_mb * MEGABYTE,
        dtype=DTYPES[dtype],
        base_hash=loaded.content_hash,
        quantization=stored(loaded, quantization),
        base=TensorFolder(model),
    )
    graphdef, state = nnx.split(loaded.model)
    return Engine(
        graphdef,
        state,
        config=loaded.model.config,
        base_name=base_name,
        stop_ids=stop_ids,
        adapters=AdapterStore(adapters, limits, host=host_adapters, base=base_name),
        slots=slots,
        max_loras=max_loras,
        max_length=max_length,
        queue=queue,
    )


def stored(loaded: LoadedModel, quantization: Quantization | None) -> Quantization | None:
    """How the base's weights are stored; None where they are not packed."""
    packed = packed_projection(loaded.model)
    if packed is None:
        return None
    return quantization or Quantization(double=packed.double)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
