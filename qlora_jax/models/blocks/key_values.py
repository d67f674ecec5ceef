"""The cache of an attention block: keys and values of the tokens seen so far."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from qlora_jax.models.specs import AttentionSpec


class KeyValues(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer of a stack.

    Attention multiplies both as they lie: heads are batches of matrices, and what is summed over, the head's elements
    of k and the places of v, stands last. In another order XLA transposes the whole cache for every token.

    Attributes:
      k: `[L, B, K, S, H]`. v: `[L, B, K, H, S]`.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K H S"]

    @classmethod
    def empty(cls, spec: AttentionSpec, layers: int, batch: int, places: int, dtype) -> "KeyValues":
        """For `batch` texts of at most `places` tokens."""
        heads, head_dim = (layers, batch, spec.kv_heads), spec.head_dim
        return cls(jnp.zeros((*heads, places, head_dim), dtype), jnp.zeros((*heads, head_dim, places), dtype))

    def at_layer(self, layer: Int[Array, ""], row: Int[Array, ""] | None) -> "LayerKeyValues":
        """One layer's part, by reference."""
        return LayerKeyValues(self.k, self.v, layer, row)


class LayerKeyValues(NamedTuple):
    """One layer's part of the keys and values, by reference: a loop over layers writes into the whole, in place.

    `row` is the only row that tokens are for, or None where there are some for each.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K H S"]
    layer: Int[Array, ""]
    row: Int[Array, ""] | None = None

    @property
    def whole(self) -> KeyValues:
        """The keys and values of all layers, with what was appended to this one."""
        return KeyValues(self.k, self.v)

    def append(self, k: Float[Array, "b T K H"], v: Float[Array, "b T K H"], start) -> "LayerKeyValues":
        """With the tokens' keys and values in the places from `start` on: int32, a scalar or one for each row.

        What lies past the last place is dropped where each row has its own start; one start for all must leave room.
        """
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        if jnp.ndim(start) == 0:
            row = 0 if self.row is None else self.row
            k, v = k.transpose(0, 2, 1, 3)[None], v.transpose(0, 2, 3, 1)[None]
            k = lax.dynamic_update_slice(self.k, k, (self.layer, row, 0, start, 0))
            v = lax.dynamic_update_slice(self.v, v, (self.layer, row, 0, 0, start))
        else:
            row, place = jnp.arange(k.shape[0])[:, None], start[:, None] + jnp.arange(k.shape[1])
            how: Any = dict(mode="drop", unique_indices=True)
            k = self.k.at[self.layer, row, :, place].set(k, **how)
            v = self.v.at[self.layer, row, :, :, place].set(v, **how)
        return self._replace(k=_as_it_lies(k), v=_as_it_lies(v))

    def read(self, dtype) -> tuple[Float[Array, "b S K H"], Float[Array, "b S K H"]]:
        """The layer's keys and values, of `row` only where there is one."""
        k, v = (lax.dynamic_index_in_dim(whole, self.layer, 0, keepdims=False) for whole in (self.k, self.v))
        if self.row is not None:
            k, v = (lax.dynamic_index_in_dim(rows, self.row, 0) for rows in (k, v))
        return k.transpose(0, 2, 1, 3).astype(dtype), v.transpose(0, 3, 1, 2).astype(dtype)


class Fresh(NamedTuple):
    """The keys and values of a forward pass without a cache, where later layers borrow them.

    Attributes:
      k, v: `[B, T, K, H]`.
    """

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]

    @classmethod
    def empty(cls, spec: AttentionSpec, shape: tuple[int, ...], dtype) -> "Fresh":
        """Before there are any, for tokens `[B, T]`."""
        zeros = jnp.zeros((*shape, spec.kv_heads, spec.head_dim), dtype)
        return cls(zeros, zeros)

    def at_layer(self, layer: Int[Array, ""] | int, row: Int[Array, ""] | None) -> "Fresh":
        """Those of the newest layer, whichever it is."""
        return self

    @property
    def whole(self) -> "Fresh":
        """As it is."""
        return self

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], start) -> "Fresh":
        """A layer's, in place of an earlier layer's."""
        return Fresh(k, v)

    def read(self, dtype) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """The newest ones."""
        return self.k.astype(dtype), self.v.astype(dtype)


def _as_it_lies(whole: Array) -> Array:
    """Holds XLA to the order of the axes in memory: it would lay the cache out anew before and after the loop."""
    return with_layout_constraint(whole, Layout(major_to_minor=tuple(range(whole.ndim))))
