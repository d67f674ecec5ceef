"""Token vectors."""

from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.quant.packed import take_rows


class Embedding(nnx.Module):
    """A table `[V, D]` of token vectors: an array, or packed. In a HostTable nothing is looked up here."""

    def __init__(self, weight, *, kind=Frozen):
        self.weight = kind(weight)

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return take_rows(self.weight.get_value(), tokens)
