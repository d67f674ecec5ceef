"""A projection that some layers of a decoder hold in NF4 and others in 16 or 32 bits, as dynamic 4-bit uploads do."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from qlora_jax.quant.nf4 import NF4Tensor
from qlora_jax.quant.packed import ByLayer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedStack(ByLayer):
    """The matrices `W[N, K]` of L layers, P of them packed and Q as they were, so that none takes more than it must.

    Attributes:
      packed: NF4Tensor `[P, …]`.
      plain: float `[Q, N, K]`.
      places: for each layer where it lies: p ≥ 0 in `packed`, -1 - q in `plain`.
    """

    packed: Any
    plain: Any
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one matrix."""
        return self.packed.shape

    def at_layer(self, index: Int[Array, ""]) -> "MixedLayer":
        """One layer of the stack, by reference."""
        return MixedLayer(self, index)

    def layer(self, index: int) -> NF4Tensor | Float[Array, "N K"]:
        """One layer's matrix, as it is stored."""
        place = self.places[index]
        return self.packed[place] if place >= 0 else self.plain[-1 - place]


def places_of(packed: tuple[bool, ...]) -> tuple[int, ...]:
    """MixedStack's `places` where these layers are packed and the others are not, each kind in the layers' order."""
    return tuple(sum(packed[:i]) if here else sum(packed[:i]) - i - 1 for i, here in enumerate(packed))


class MixedLayer(NamedTuple):
    """One matrix of a MixedStack, by reference (as NF4Layer). `index`: int32 scalar, which may be traced."""

    stack: MixedStack
    index: Any


def layer_of(stack: Any, index: int) -> Any:
    """One layer's weight of a stack `[L, …]`, as it is stored."""
    return stack.layer(index) if isinstance(stack, MixedStack) else stack[index]


def packed_part(stack: Any) -> NF4Tensor | None:
    """The packed matrices of a stack; None where none is in NF4."""
    part = stack.packed if isinstance(stack, MixedStack) else stack
    return part if isinstance(part, NF4Tensor) else None
