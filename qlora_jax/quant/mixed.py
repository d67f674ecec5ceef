"""A projection that some layers of a decoder hold in NF4 and others in 16 or 32 bits, as dynamic 4-bit uploads do."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from qlora_jax.quant.nf4 import NF4Tensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedStack:
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
