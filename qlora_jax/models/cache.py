"""The key/value cache of a generation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import ModelConfig

EMPTY = -1


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer.

    Attention multiplies both as they lie: heads are batches of matrices, and what is summed over, the head's elements
    of k and the slots of v, stands last. In another order XLA transposes the whole cache for every token.

    Attributes:
      k: `[L, B, K, S, H]`. v: `[L, B, K, H, S]`.
      positions: int32 `[B, S]`, each slot's position in its text, -1 where the slot is empty or padding.
      length: int32 scalar, slots filled.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K H S"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]


class LayerCache(NamedTuple):
    """One layer's part of a cache, by reference: a loop over layers writes into the whole, in place."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K H S"]
    layer: Int[Array, ""]

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], slot: int | Int[Array, ""]
    ) -> "LayerCache":
        """With the tokens' keys and values in the slots from `slot` on."""
        k, v = k.transpose(0, 2, 1, 3).astype(self.k.dtype), v.transpose(0, 2, 3, 1).astype(self.v.dtype)
        return self._replace(
            k=_as_it_lies(lax.dynamic_update_slice(self.k, k[None], (self.layer, 0, 0, slot, 0))),
            v=_as_it_lies(lax.dynamic_update_slice(self.v, v[None], (self.layer, 0, 0, 0, slot))),
        )

    def read(self, dtype) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """The layer's keys and values."""
        k, v = (lax.dynamic_index_in_dim(whole, self.layer, 0, keepdims=False) for whole in (self.k, self.v))
        return k.transpose(0, 2, 1, 3).astype(dtype), v.transpose(0, 3, 1, 2).astype(dtype)


def _as_it_lies(whole: Array) -> Array:
    """Holds XLA to the order of the axes in memory: it would lay the cache out anew before and after the loop."""
    return with_layout_constraint(whole, Layout(major_to_minor=tuple(range(whole.ndim))))


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype) -> Cache:
    """A cache for `batch` texts of at most `slots` tokens."""
    heads, head_dim = (config.num_layers, batch, config.num_kv_heads), config.head_dim
    k, v = jnp.zeros((*heads, slots, head_dim), dtype), jnp.zeros((*heads, head_dim, slots), dtype)
    return Cache(k, v, jnp.full((batch, slots), EMPTY, jnp.int32), jnp.int32(0))
