"""The low-rank update of one linear layer (or of a stack of them)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class AdapterScale(nnx.Variable):
    """alpha / r of every layer of a stack: fixed, but part of the adapter."""


class LoRA(nnx.Module):
    """Δ(x) = scale · (dropout(x) · Aᵀ) · Bᵀ  (arXiv 2106.09685).

    Attributes:
      A: float `[*L, r, K]`, drawn from U(-1/√K, 1/√K).
      B: float `[*L, N, r]`, zeros at the start, so that training begins at the base model.
      scale: float32 `[*L]`.

    Layers of a stack may have different ranks: r is then the largest, and a smaller one's unused rows of A and columns
    of B are zero. They stay so, because each one's gradient is a multiple of the other.
    """

    def __init__(self, A, B, scale, dropout: float = 0.0):
        self.A, self.B = nnx.LoRAParam(A), nnx.LoRAParam(B)
        self.scale = AdapterScale(scale)
        self.dropout = dropout

    def outputs(self, start: int | Int[Array, ""], size: int) -> "LoRA":
        """The update of `size` outputs of a single layer, from `start` on, which may be traced."""
        B = jax.lax.dynamic_slice_in_dim(self.B.get_value(), start, size)
        return LoRA(self.A.get_value(), B, self.scale.get_value(), self.dropout)

    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Float[Array, "*B N"]:
        """The update in the dtype of x. `key` turns dropout on."""
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), 0).astype(x.dtype)
        A, B = self.A.get_value().astype(x.dtype), self.B.get_value().astype(x.dtype)
        low = jnp.einsum("...K,rK->...r", x, A)
        low = (low.astype(jnp.float32) * self.scale.get_value()).astype(x.dtype)
        return _expand(low, B)


@jax.custom_vjp
def _expand(low: Float[Array, "*B r"], B: Float[Array, "N r"]) -> Float[Array, "*B N"]:
    """low · Bᵀ. Its derivative by B is taken as (lowᵀ · dy)ᵀ: XLA's CPU backend would transpose dy, the large one."""
    return jnp.einsum("...r,Nr->...N", low, B)


def _expand_forward(low, B):
    return _expand(low, B), (low, B)


def _expand_backward(kept, dy):
    low, B = kept
    tokens = tuple(range(dy.ndim - 1))
    dB = jax.lax.dot_general(low, dy, ((tokens, tokens), ((), ()))).T
    return jnp.einsum("...N,Nr->...r", dy, B), dB


_expand.defvjp(_expand_forward, _expand_backward)
