"""The caches of mixers that keep a state instead of the tokens themselves: as large after one token as after many.

A state cannot be cut back to an earlier token. So whoever calls says which tokens count (`Context.counts`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.models.specs import ConvSpec, DeltaSpec


class ConvState(NamedTuple):
    """What short convolutions keep, for every layer of a stack.

    Attributes:
      inputs: the last W inputs, the newest last, for a convolution over W + 1 tokens; zeros where there were none.
    """

    inputs: Float[Array, "L B W C"]

    @classmethod
    def empty(cls, spec: ConvSpec, layers: int, batch: int, places: int, dtype) -> "ConvState":
        """For `batch` texts, however long."""
        return cls(jnp.zeros((layers, batch, spec.kernel - 1, spec.width), dtype))

    def at_layer(self, layer: Int[Array, ""], row: Int[Array, ""] | None) -> "LayerStates":
        """One layer's part, by reference."""
        return LayerStates(self, layer, row)


class DeltaState(NamedTuple):
    """What gated DeltaNet keeps, for every layer of a stack.

    Attributes:
      inputs: as a ConvState's, of queries, keys and values.
      memory: what maps keys to values, in float32: an error would be carried on from token to token.
    """

    inputs: Float[Array, "L B W C"]
    memory: Float32[Array, "L B N H V"]

    @classmethod
    def empty(cls, spec: DeltaSpec, layers: int, batch: int, places: int, dtype) -> "DeltaState":
        """For `batch` texts, however long."""
        inputs = jnp.zeros((layers, batch, spec.kernel - 1, 2 * spec.keys + spec.values), dtype)
        return cls(inputs, jnp.zeros((layers, batch, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32))

    def at_layer(self, layer: Int[Array, ""], row: Int[Array, ""] | None) -> "LayerStates":
        """One layer's part, by reference."""
        return LayerStates(self, layer, row)


class LayerStates(NamedTuple):
    """One layer's part of the states, by reference: a loop over layers writes into the whole, in place.

    `row` is the only row that tokens are for, or None where there are some for each.
    """

    whole: Any
    layer: Int[Array, ""]
    row: Int[Array, ""] | None = None

    def read(self, start: int | Int[Array, ""] | Int[Array, " b"]) -> Any:
        """The layer's states as arrays `[b, …]`: zeros in a row whose first token comes now, at place 0."""

        def own(array):
            found = lax.dynamic_index_in_dim(array, self.layer, 0, keepdims=False)
            if self.row is not None:
                found = lax.dynamic_index_in_dim(found, self.row, 0)
            return jnp.where(jnp.reshape(start, (-1, *[1] * (found.ndim - 1))) == 0, 0, found)

        return jax.tree.map(own, self.whole)

    def write(self, states: Any) -> "LayerStates":
        """With other states in this layer, of what `read` gives."""

        def into(array, own):
            place = (self.layer, 0 if self.row is None else self.row, *[0] * (array.ndim - 2))
            return lax.dynamic_update_slice(array, own.astype(array.dtype)[None], place)

        return self._replace(whole=jax.tree.map(into, self.whole, states))
