"""Choosing the next token from its scores."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the scores; 0 takes the best token.
      top_k: only the k best tokens can be drawn; 0 for all.
      top_p: only the smallest set of best tokens whose probabilities reach p can be drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


class RowSampling(NamedTuple):
    """A Sampling for each row, as arrays."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One int32 token per row."""
    if sampling.temperature == 0:
        return _best(logits)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        rows = logits.shape[0]
        logits = _truncated(logits, jnp.full(rows, sampling.top_k), jnp.full(rows, sampling.top_p))
    return jax.random.categorical(key, logits).astype(jnp.int32)


def sample_rows(logits: Float[Array, "B V"], keys: Key[Array, " B"], rows: RowSampling) -> Int[Array, " B"]:
    """One int32 token per row, as `sample` draws it from that row alone by its key and its Sampling."""

    def drawn():
        scaled = logits.astype(jnp.float32) / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        truncating = (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))
        # Sorting a vocabulary takes longer than all else here: only where someone asks for it.
        kept = lax.cond(jnp.any(truncating), lambda: _truncated(scaled, rows.top_k, rows.top_p), lambda: scaled)
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, tokens, _best(logits))

    return lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: _best(logits))


def _best(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _truncated(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf for every token below the k-th best, and then for every one that the better ones leave no room for.

    The best one always stays. 0 and 1 leave a row as it is.
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    best = jnp.take_along_axis(logits, order, axis=-1)
    last = jnp.clip(jnp.where(top_k > 0, top_k, logits.shape[-1]), 1, logits.shape[-1]) - 1
    best = jnp.where(best < jnp.take_along_axis(best, last[:, None], axis=-1), -jnp.inf, best)
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    best = jnp.where((before >= top_p[:, None]) & (top_p < 1)[:, None], -jnp.inf, best)
    return jnp.take_along_axis(best, jnp.argsort(order, axis=-1), axis=-1)
