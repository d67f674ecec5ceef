"""The key/value cache of a generation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import ModelConfig

EMPTY = -1


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer.

    Attributes:
      k, v: `[L, B, S, K, H]`.
      positions: int32 `[B, S]`, each slot's position in its text, -1 where the slot is empty or padding.
      length: int32 scalar, slots filled.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype) -> Cache:
    """A cache for `batch` texts of at most `slots` tokens."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    positions = jnp.full((batch, slots), EMPTY, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.int32(0))
