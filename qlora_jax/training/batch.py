"""A batch as the jitted steps take it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.data import Batch
from qlora_jax.quant.host_table import host_table


def to_device(batch: Batch, names: Sequence[str], base: Any) -> dict[str, Array]:
    """The named arrays of a batch on the device.

    Where `base`, a model's frozen state, keeps its embedding in host memory, `embedded` is among them: the tokens' rows
    of it `[A, B, T, D]`.
    """
    arrays = {name: jnp.asarray(batch[name]) for name in names}
    table = host_table(base)
    return arrays if table is None else arrays | {"embedded": jnp.asarray(table.rows(batch["tokens"]))}
