"""LoRA: a low-rank update (arXiv 2106.09685). Its formula stands here and nowhere else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.lora.adapter import AdapterScale, LinearAdapter, PeftName, Shape, Site
from qlora_jax.lora.init import init_pair
from qlora_jax.lora.targets import Target


def low_rank_update(x: Float[Array, "*B K"], A: Any, B: Any, scale: Any) -> Float[Array, "*B N"]:
    """scale · (x · Aᵀ) · Bᵀ, of `A[r, K]` and `B[N, r]`, in the dtype of x; the scale multiplies in float32."""
    A, B = A.astype(x.dtype), B.astype(x.dtype)
    low = jnp.einsum("...K,rK->...r", x, A)
    low = (low.astype(jnp.float32) * scale).astype(x.dtype)
    return _expand(low, B)


def low_rank_delta(A: Any, B: Any, scale: float) -> Any:
    """ΔW = scale · B·A `[N, K]` in float32, of arrays of NumPy or JAX."""
    return scale * (B.astype(np.float32) @ A.astype(np.float32))


class Pair(NamedTuple):
    """One module's A `[r, K]` and B `[N, r]`, or a stack's with leading axes."""

    A: Any
    B: Any


def stack_pairs(pairs: list[Any], shape: Shape, dtype: Any) -> Pair:
    """Those of all layers, `[L, …]`, padded with zeros to `shape.rank`; zeros for a layer that has None."""
    outputs, inputs, rank, experts = shape
    leading = (len(pairs), experts) if experts else (len(pairs),)
    A, B = np.zeros((*leading, rank, inputs), dtype), np.zeros((*leading, outputs, rank), dtype)
    for layer, pair in enumerate(pairs):
        if pair is not None:
            own = pair.A.shape[-2]
            A[layer, ..., :own, :], B[layer, ..., :own] = pair
    return Pair(A, B)


def misfit(pair: Pair, shape: Shape) -> tuple[str, tuple, tuple] | None:
    """(name, shape, expected shape) of the first of A and B that does not fit; None where both do."""
    leading = (shape.experts,) if shape.experts else ()
    wanted = (*leading, shape.rank, shape.inputs), (*leading, shape.outputs, shape.rank)
    for name, array, want in zip("AB", (pair.A, pair.B), wanted, strict=True):
        if array.shape != want:
            return f"lora_{name}", array.shape, want
    return None


class LoRA(LinearAdapter):
    """Δ(x) = scale · (dropout(x) · Aᵀ) · Bᵀ.

    Attributes:
      A: float `[*L, r, K]`, drawn from U(-1/√K, 1/√K).
      B: float `[*L, N, r]`, zeros at the start, so that training begins at the base model.
      scale: float32 `[*L]`.

    Layers of a stack may have different ranks: r is then the largest, and a smaller one's unused rows of A and columns
    of B are zero. They stay so, because each one's gradient is a multiple of the other.
    """

    Parts = Pair
    NAMES = {matrix: PeftName(f"lora_{matrix}", ".weight", 2) for matrix in "AB"}

    def __init__(self, A, B, scale, dropout: float = 0.0):
        self.A, self.B = nnx.LoRAParam(A), nnx.LoRAParam(B)
        self.scale = AdapterScale(scale)
        self.dropout = dropout

    @classmethod
    def start(cls, key: Array, name: str, target: Target | None, shape: Shape, site: Site) -> Pair:
        return Pair(*init_pair(key, name, target, shape[:3], site.dtype))

    @classmethod
    def of(cls, parts: Pair, scale: Any, dropout: float) -> "LoRA":
        return cls(jnp.asarray(parts.A), jnp.asarray(parts.B), jnp.asarray(scale), dropout)

    @classmethod
    def stacked(cls, parts: list[Any], shape: Shape, dtype: Any) -> Pair:
        return stack_pairs(parts, shape, dtype)

    @classmethod
    def check_shapes(cls, parts: Pair, shape: Shape) -> tuple[str, tuple, tuple] | None:
        return misfit(parts, shape)

    @classmethod
    def size(cls, shape: Shape) -> int:
        return shape.rank * (shape.outputs + shape.inputs)

    @classmethod
    def merge(
        cls, weight: np.ndarray, parts: Pair, scale: float, rows: slice = slice(None), expert: int = 0
    ) -> np.ndarray:
        """W + scale · B·A, added in float32 and cast once to the dtype of W `[N, K]`."""
        return (weight.astype(np.float32) + low_rank_delta(parts.A, parts.B[rows], scale)).astype(weight.dtype)

    def parts(self, layer: int | None, rank: int) -> Pair:
        A, B = np.asarray(self.A.get_value()), np.asarray(self.B.get_value())
        A, B = (A, B) if layer is None else (A[layer], B[layer])
        return Pair(A[:rank], B[:, :rank])

    def outputs(self, start: int | Int[Array, ""], size: int) -> "LoRA":
        B = jax.lax.dynamic_slice_in_dim(self.B.get_value(), start, size)
        return LoRA(self.A.get_value(), B, self.scale.get_value(), self.dropout)

    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Float[Array, "*B N"]:
        """The update in the dtype of x. `key` turns dropout on."""
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), 0).astype(x.dtype)
        return low_rank_update(x, self.A.get_value(), self.B.get_value(), self.scale.get_value())

    def apply(self, y: Float[Array, "*B N"], made: Any, weight: Any, bias: jax.Array | None) -> Float[Array, "*B N"]:
        return y + made


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
