"""Many adapters of one linear layer side by side, of which each row of a batch takes its own."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.lora.low_rank import low_rank_update
from qlora_jax.quant.packed import ByLayer


class AdapterStack(NamedTuple):
    """The adapters of a linear layer, for all layers of a decoder; ranks below r are padded with zeros.

    Attributes:
      A: `[L, slots, r, K]`. B: `[L, slots, N, r]`.
      scale: float32 `[L, slots]`.
    """

    A: Float[Array, "L slots r K"]
    B: Float[Array, "L slots N r"]
    scale: Float[Array, "L slots"]


class RowAdapters(NamedTuple):
    """A stack, which of its slots each row takes, and which layer it is: None before a loop over layers says so."""

    stack: AdapterStack
    slots: Int[Array, " B"]
    layer: Int[Array, ""] | None = None

    def at_layer(self, index: Int[Array, ""]) -> "RowAdapters":
        """Those of one layer, by reference."""
        return self._replace(layer=index)


# A loop over layers reads the stacks where they lie.
ByLayer.register(RowAdapters)


class Served(nnx.Variable):
    """The RowAdapters of a linear layer: no parameter, but what a request chose."""


class RowLoRA(nnx.Module):
    """Δ(x)ᵦ = scaleᵦ · (xᵦ · Aᵦᵀ) · Bᵦᵀ for every row b of x, with the A and B of that row's slot.

    Each row reads its own A and B by index. A sum over all slots, masked for the rows that have another one, would read
    every slot for every row, and let a NaN of one adapter into all rows: 0 · NaN is NaN.
    """

    def __init__(self, adapters: RowAdapters):
        self.adapters = Served(adapters)

    def __call__(self, x: Float[Array, "B T K"], key: Array | None = None) -> Float[Array, "B T N"]:
        """The update in the dtype of x. There is no dropout: `key` must be None."""
        assert key is None
        stack, slots, layer = self.adapters.get_value()
        own = stack.A[layer, slots], stack.B[layer, slots], stack.scale[layer, slots]
        return jax.vmap(low_rank_update)(x, *own)

    def apply(self, y: Float[Array, "B T N"], made: Any, weight: Any, bias: jax.Array | None) -> Float[Array, "B T N"]:
        """The layer's output with the update."""
        return y + made
