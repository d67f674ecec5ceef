"""A token embedding that stays in host memory: only the rows of a step's tokens go to the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int


@jax.tree_util.register_static
class HostTable:
    """A table `[V, D]` in host memory, in a model's place for its embedding.

    To JAX it is structure, not data: it has no leaves, so no jitted function takes it to the device, and no optimizer
    sees it. `Decoder.hidden` is then given the rows that were looked up, by its argument `embedded`.

    Attributes:
      array: a numpy array, or a shape where only the structure is needed.
    """

    def __init__(self, array: np.ndarray | jax.ShapeDtypeStruct):
        self.array = array

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.array.shape)) * self.dtype.itemsize

    def rows(self, tokens: Int[np.ndarray, "*B"]) -> Float[np.ndarray, "*B D"]:
        """The rows of these tokens, on the host."""
        assert isinstance(self.array, np.ndarray)
        return self.array[tokens]

    def rows_shape(self, tokens: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """The shape of the rows of an array of tokens of this shape."""
        return jax.ShapeDtypeStruct((*tokens, self.array.shape[1]), self.dtype)


def host_table(state: Any) -> HostTable | None:
    """The table that a model's state keeps in host memory; None where there is none."""
    return next(filter(_is_table, jax.tree.leaves(state, is_leaf=_is_table)), None)


def with_table_on_device(state: Any) -> Any:
    """The state with that table on the device, for generation, which looks up tokens that it draws there."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.array) if _is_table(leaf) else leaf, state, is_leaf=_is_table)


def _is_table(leaf: Any) -> bool:
    return isinstance(leaf, HostTable)
