"""Starting values of A and B."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.lora.targets import Target


def key_for(key: Array, name: str) -> Array:
    """A key that depends on the module's name alone, so that another target more or less moves no one else's values."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def init_pair(
    key: Array,
    name: str,
    target: Target | None,
    *,
    rank: int,
    in_features: int,
    out_features: int,
    dtype=jnp.float32,
) -> tuple[Float[Array, "r K"], Float[Array, "N r"]]:
    """A and B of one module, padded with zeros from its own rank to `rank`; all zeros where it has no target.

    A follows PEFT: kaiming-uniform with a = √5, which is U(-1/√K, 1/√K).
    """
    own = target.rank if target else 0
    bound = in_features**-0.5
    A = jax.random.uniform(key_for(key, name), (rank, in_features), dtype, -bound, bound)
    A = jnp.where(jnp.arange(rank)[:, None] < own, A, 0)
    return A, jnp.zeros((out_features, rank), dtype)
