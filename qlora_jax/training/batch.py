"""A batch as the jitted steps take it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from qlora_jax.data import Batch
from qlora_jax.quant.host_table import host_table


class TensorBatch(NamedTuple):
    """A batch on the device: int32 and bool `[A, B, T]`, see data.Batch.

    Attributes:
      embedded: the tokens' rows of the embedding `[A, B, T, D]`, where it stays in host memory.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    scored: Any
    embedded: Any = None


def to_device(batch: Batch, base: Any) -> TensorBatch:
    """The batch on the device; `base`, a model's frozen state, may keep its embedding in host memory."""
    table = host_table(base)
    arrays = (*batch, None if table is None else table.rows(batch.tokens))
    return TensorBatch(*(None if array is None else jnp.asarray(array) for array in arrays))
