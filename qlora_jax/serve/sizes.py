"""What a serving engine is made of: the model that it serves, and how much it holds at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from qlora_jax.config import QuantSection
from qlora_jax.models.config import DTYPES, ModelConfig


class Base(NamedTuple):
    """The model that is served.

    Attributes:
      graphdef, state: it without adapters, as `nnx.split` gives it; `state` is what follows the structure.
      config: its geometry.
      name: what requests call it.
      stop_ids: tokens that end a text.
    """

    graphdef: nnx.GraphDef
    state: tuple[Any, ...]
    config: ModelConfig
    name: str
    stop_ids: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much an engine holds at once.

    Attributes:
      slots: rows, that is texts that are written at once.
      max_loras: adapters that the device holds at once.
      max_rank: the largest rank of an adapter; each takes the memory of this one on the device.
      max_expert_rank: the same on the experts of a mixture; 0 serves these as they are, and takes no memory for them.
      max_length: tokens of the longest text, prompt and answer together.
      queue: requests that may wait for a row.
      host_adapters: adapters that are kept in host memory.
      max_adapter_mb: the largest file of an adapter's weights, in megabytes.

    Raises:
      ValueError: a size below 1, or max_expert_rank below 0.
    """

    slots: int = 8
    max_loras: int = 8
    max_rank: int = 64
    max_expert_rank: int = 0
    max_length: int = 2048
    queue: int = 64
    host_adapters: int = 64
    max_adapter_mb: int = 2048

    def __post_init__(self) -> None:
        for item in dataclasses.fields(Sizes):
            size, least = getattr(self, item.name), int(item.name != "max_expert_rank")
            if size < least:
                raise ValueError(f"{item.name} must be at least {least}, got {size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions(Sizes):
    """How an engine is opened.

    Attributes:
      quant, dtype: as every command has them: "auto", "none" or "nf4"; a key of DTYPES.
      quantization: how "nf4" packs; the default where None. Adapters trained with another are refused.
    """

    quant: str = "auto"
    dtype: str = "bf16"
    quantization: QuantSection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
