"""Log-probabilities of tokens from hidden states: a chunk of tokens, and a slice of the vocabulary, at a time.

The logits of one chunk exist at a time, with slices those of one slice of the vocabulary only, for which one slice of a
quantized head is dequantized; in the backward pass too, which computes them again. An objective goes through the chunks
by itself and keeps of each what it needs: SFT a sum, a comparison of texts every token's log-probability.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.config import VocabSlices

# Scores of hidden states `[N, D]`: `logits(h)` of every token, `logits(h, start, size)` of a part of the vocabulary.
Logits = Callable[..., Float[Array, "N V"]]


class Running(NamedTuple):
    """What some slices tell of each token: the highest score, the sum of exp(score - highest), the label's score."""

    highest: Float[Array, " N"]
    total: Float[Array, " N"]
    label: Float[Array, " N"]

    @classmethod
    def start(cls, tokens: int) -> "Running":
        """Before the first slice."""
        return cls(jnp.full(tokens, -jnp.inf), jnp.zeros(tokens), jnp.zeros(tokens))

    def add(self, scores: Float[Array, "N S"], column: Int[Array, " N"]) -> "Running":
        """With another slice's scores; `column` says where in it the label is, or lies outside of it.

        The highest score only keeps exp in range: the result does not depend on it, so nothing is derived through it.
        """
        highest = lax.stop_gradient(jnp.maximum(self.highest, scores.max(-1)))
        total = self.total * jnp.exp(self.highest - highest) + jnp.exp(scores - highest[:, None]).sum(-1)
        own = jnp.arange(scores.shape[1]) == column[:, None]
        return Running(highest, total, self.label + jnp.where(own, scores, 0).sum(-1))

    def losses(self) -> Float[Array, " N"]:
        """After the last slice: log-sum-exp of the scores, less the label's."""
        return self.highest + jnp.log(self.total) - self.label


def token_log_probs(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    logits: Logits,
    *,
    chunk: int,
    slices: VocabSlices | None = None,
) -> Float[Array, "B T-1"]:
    """The log-probability of every token but each row's first, predicted from the one before it."""

    def body(_, xs):
        features, labels = xs
        return None, -chunk_losses(features, labels, logits, slices)

    with jax.named_scope("log_probs"):
        _, found = lax.scan(body, None, in_chunks(chunk, hidden[:, :-1], tokens[:, 1:]))
    rows, length = tokens.shape
    return found.reshape(-1)[: rows * (length - 1)].reshape(rows, length - 1)


def in_chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays `[B, T, …]` as `[chunks, chunk, …]`, padded with zeros."""
    padding = -(arrays[0].shape[0] * arrays[0].shape[1]) % chunk

    def chunked(x):
        flat = x.reshape(-1, *x.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(-1, chunk, *flat.shape[1:])

    return tuple(map(chunked, arrays))


def chunk_losses(
    features: Float[Array, "N D"], labels: Int[Array, " N"], logits: Logits, slices: VocabSlices | None
) -> Float[Array, " N"]:
    """The negative log-probabilities of one chunk's labels, by a running log-sum-exp over the slices."""
    if slices is None:
        whole = jax.checkpoint(lambda features: Running.start(len(labels)).add(logits(features), labels))
        return whole(features).losses()

    # Widened, so that the derivatives of the slices are added in float32.
    wide = features.astype(jnp.float32)

    @jax.checkpoint
    def body(running, index):
        # Held back: the slices are the same for every chunk of tokens, and JAX would take them all before the first.
        h, index = lax.optimization_barrier((wide, index))
        first = index * slices.size
        start = jnp.minimum(first, slices.vocab - slices.size)
        scores = logits(h.astype(features.dtype), start, slices.size)
        # The last slice begins with tokens that the one before it had.
        seen = start + jnp.arange(slices.size) < first
        scores = jnp.where(seen, -jnp.inf, scores)
        column = jnp.where(labels < first, -1, labels - start)
        return running.add(scores, column), None

    running, _ = lax.scan(body, Running.start(len(labels)), jnp.arange(slices.count, dtype=jnp.int32))
    return running.losses()
