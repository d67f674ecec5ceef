"""Many adapters of one linear layer side by side, of which each row of a batch takes its own."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


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
        A, B = stack.A[layer, slots].astype(x.dtype), stack.B[layer, slots].astype(x.dtype)
        low = jnp.einsum("BTK,BrK->BTr", x, A)
        low = (low.astype(jnp.float32) * stack.scale[layer, slots][:, None, None]).astype(x.dtype)
        return jnp.einsum("BTr,BNr->BTN", low, B)
