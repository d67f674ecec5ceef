"""A family's checkpoint with an adapter, loaded and computed once for all tests of it."""

import functools
from pathlib import Path

import numpy as np

from benchmarks.random_adapters import write_random_adapter
from qlora_jax.io.export_bnb4 import export_bnb4
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import table
from qlora_jax.quant.rules import UNPACKED
from tests.families import ours
from tests.families.checkpoints import Reference, read_reference
from tests.families.table import is_wrapped

RANK = 2


class Subject:
    """One row of the table.

    Args:
      folder: its checkpoint. `scratch`: an empty folder for what is made of it.
    """

    def __init__(self, name: str, folder: Path, scratch: Path):
        self.name, self.folder, self.scratch = name, folder, scratch

    @functools.cached_property
    def reference(self) -> Reference:
        """What transformers computes."""
        return read_reference(self.folder)

    @functools.cached_property
    def plain(self) -> Decoder:
        """The float32 model. Tests leave it as it is."""
        return ours.load(self.folder).model

    @functools.cached_property
    def plain_logits(self) -> np.ndarray:
        """Of the plain model."""
        return ours.logits(self.plain, self.reference)

    @functools.cached_property
    def adapter(self) -> Path:
        """A folder with random adapters of all linear layers."""
        return self.random_adapter("adapter", 1, targets=self.linears)

    @functools.cached_property
    def adapted_logits(self) -> np.ndarray:
        """With that adapter."""
        found = self.logits_with(self.adapter)
        assert ours.off(found, self.plain_logits) > 0.01
        return found

    @functools.cached_property
    def packed(self) -> Path:
        """A folder in bitsandbytes' 4-bit format."""
        export_bnb4(self.folder, self.scratch / "packed")
        return self.scratch / "packed"

    @functools.cached_property
    def unpacked_logits(self) -> np.ndarray:
        """Of that folder's weights, dequantized to bfloat16; computed in float32."""
        return ours.logits(ours.load(self.packed, rules=UNPACKED).model, self.reference)

    def random_adapter(self, name: str, seed: int, **lora) -> Path:
        """A new adapter folder."""
        loaded = ours.load(self.folder)
        return write_random_adapter(self.scratch / name, loaded, seed, size=0.1, rank=RANK, alpha=2.0 * RANK, **lora)

    def logits_with(self, adapter: Path) -> np.ndarray:
        """Of the model with an adapter."""
        return ours.logits(ours.load(self.folder, adapter=adapter).model, self.reference)

    @property
    def linears(self) -> tuple[str, ...]:
        """The modules that "all-linear" adapts."""
        return self._modules("projection", "gate")

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of them that are packed."""
        return self._modules("projection")

    def _modules(self, *roles: str) -> tuple[str, ...]:
        params = [param for param in table(self.plain.config).values() if param.role in roles]
        return tuple(tensor.module for param in params for tensor in param.tensors())

    @property
    def wrapped(self) -> bool:
        """Whether the model is of more than text."""
        return is_wrapped(self.name)
