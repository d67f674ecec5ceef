"""What every stored weight offers, whatever its format, and the same operations on plain arrays.

Nothing outside quant/ and kernels/ asks what kind a weight is: it asks these functions.
"""

import abc
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.device.facts import nbytes, tree_bytes
from qlora_jax.quant.host_table import HostTable

# What axes before a matrix' own count, from the outside in: a stack is `[layer, …]`, one of experts
# `[layer, expert, …]`; what a loop over layers sees has lost the first.
LAYER, EXPERT = "layer", "expert"


class ByLayer(abc.ABC):
    """What a loop over layers reads where it lies: a scan's own slices of it would be copies."""

    @abc.abstractmethod
    def at_layer(self, index: Int[Array, ""]) -> Any:
        """One layer by reference. `index` may be traced."""


class Packed(ByLayer):
    """A weight `W[N, K]` in fewer bits, or a stack of them with leading axes `*L` (LAYER, EXPERT). A pytree.

    Attributes:
      codes: `[*L, …]` with two axes for each matrix, a byte each.
      shape: (N, K) of one matrix.
      dtype: name of the dtype that the weight had and is dequantized to ("bfloat16", "float16", "float32").
    """

    codes: Any
    shape: tuple[int, int]
    dtype: str

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the leading axes `*L`."""
        return tuple(self.codes.shape[:-2])

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes alone."""
        return nbytes(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return tree_bytes(self)

    @abc.abstractmethod
    def dequantize(self, dtype: Any = None) -> Float[Array, "*L N K"]:
        """The weight, rounded once to its own dtype, then cast to `dtype` if given."""

    @abc.abstractmethod
    def take_rows(self, index: Int[Array, " M"]) -> "Packed":
        """Of one matrix the rows at `index`: `[M, K]`. Raises ValueError where the format has no rows of their own."""

    @abc.abstractmethod
    def slice_rows(self, start: int | Int[Array, ""], size: int) -> "Packed":
        """Of one matrix `size` rows from `start` on, which may be traced; raises as `take_rows`."""

    def at_layer(self, index: Int[Array, ""]) -> Any:
        """One layer of a stack by reference: its matrix, or its Experts where each layer has several."""
        return Experts(self, index) if len(self.leading) > 1 else self.matrix(index)

    def matrix(self, index: Int[Array, ""]) -> Any:
        """One matrix of a stack with one leading axis, by reference; `kernels.linear.matmul` knows what it is."""
        return PackedMatrix(self, index)

    def __getitem__(self, index: int) -> "Packed":
        """One weight (or a sub-stack) of a stack."""
        if not self.leading:
            raise IndexError(f"this {type(self).__name__} holds a single matrix: dequantize it to index its elements")
        return jax.tree.map(lambda a: a[index], self)


class PackedMatrix(NamedTuple):
    """One matrix of a stack, by reference: only what reads it slices it out.

    Attributes:
      stack: Packed, with one leading axis.
      index: int32 scalar, which of the stack; may be traced.
    """

    stack: Any
    index: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.stack.shape

    def take(self) -> Packed:
        """The matrix by itself: a copy of its arrays, unless XLA can fuse the slice into what reads it."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, self.index, 0, keepdims=False), self.stack)


class Experts(NamedTuple):
    """The E experts of one layer, by reference into the stack of all layers' experts.

    Attributes:
      stack: Packed, with the leading axes (L, E).
      layer: int32 scalar, which of the L; may be traced.
    """

    stack: Any
    layer: Any

    def matrix(self, index: Int[Array, ""]) -> Any:
        """One expert, by reference. The stack is seen as one of L·E matrices, which moves nothing."""
        layers, experts = self.stack.leading
        flat = jax.tree.map(lambda a: a.reshape(layers * experts, *a.shape[2:]), self.stack)
        return flat.matrix(self.layer * experts + index)


# A plain array counts as a weight that is stored as it is; a HostTable has no rows on the device.
Weight = Float[Array, "N K"] | Packed | HostTable


def stays_whole(leaf: Any) -> bool:
    """Whether a loop over layers reads a node of a pytree where it lies, by `at_layer`, instead of slicing it."""
    return isinstance(leaf, ByLayer)


def is_packed(leaf: Any) -> bool:
    """Whether a weight, or a node of a pytree of weights, is stored in fewer bits."""
    return isinstance(leaf, Packed)


def take_rows(weight: Weight, index: Int[Array, "*B"]) -> Float[Array, "*B K"]:
    """The rows at `index`, dequantized; no other row of the table is.

    Raises:
      ValueError: a table in NF4 whose rows are no multiple of 64 elements.
      TypeError: a table in host memory.
    """
    if isinstance(weight, HostTable):
        raise TypeError("the embedding stays in host memory: look up there, and pass the rows as `embedded`")
    if not isinstance(weight, Packed):
        return weight[index]
    return weight.take_rows(index.reshape(-1)).dequantize().reshape(*index.shape, -1)


def slice_rows(weight: Weight, start: int | Int[Array, ""], size: int) -> Float[Array, "M K"] | Packed:
    """`size` rows from `start` on, which may be traced; stored as the whole is. Raises as `take_rows` does."""
    if isinstance(weight, Packed):
        return weight.slice_rows(start, size)
    assert not isinstance(weight, HostTable)  # no output layer
    return lax.dynamic_slice_in_dim(weight, start, size)


def dequantized(weight: Any) -> Any:
    """The weight as an array of its own dtype; an array as it is."""
    return weight.dequantize() if isinstance(weight, Packed) else weight


def expert(weight: Any, index: Int[Array, ""]) -> Any:
    """Matrix `index`, which may be traced, of one layer's experts; a packed one by reference.

    Args:
      weight: Experts, Packed `[E, …]`, or a plain array `[E, N, K]`.
    """
    if isinstance(weight, Packed | Experts):
        return weight.matrix(index)
    return lax.dynamic_index_in_dim(weight, index, 0, keepdims=False)


def is_trainable(weight: Any) -> bool:
    """Whether a weight, or a layer's experts, can be differentiated by: only what is stored as it is can."""
    return not isinstance(weight, Packed | Experts | HostTable)
