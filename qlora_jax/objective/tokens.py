"""Cross-entropy over hidden states: a chunk of tokens, and a slice of the vocabulary, at a time."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Scores of hidden states `[N, D]`: `logits(h)` of every token, `logits(h, start, size)` of a part of the vocabulary.
Logits = Callable[..., Float[Array, "N V"]]
# Matrix products of a GPU like sizes of this multiple.
ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class VocabSlices:
    """The vocabulary in `count` slices of `size` tokens; the last one begins early enough to be whole."""

    count: int
    size: int
    vocab: int


def vocab_slices(chunk: int, vocab: int) -> VocabSlices | None:
    """Equal slices of about `chunk` tokens or fewer; None, which is the whole vocabulary, where `chunk` is 0."""
    if chunk == 0:
        return None
    even = -(-vocab // -(-vocab // chunk))
    size = -(-even // ALIGNMENT) * ALIGNMENT
    return VocabSlices(-(-vocab // size), size, vocab) if size < vocab else None


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


def next_token_loss(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    logits: Logits,
    *,
    chunk: int,
    slices: VocabSlices | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed negative log-likelihood of the scored tokens, each predicted from the one before it, and their number.

    The logits of `chunk` tokens exist at a time, with `slices` those of one slice of the vocabulary only, for which one
    slice of a quantized head is dequantized; in the backward pass too, which computes them again.
    """
    features = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels, weights = tokens[:, 1:].reshape(-1), scored[:, 1:].reshape(-1)
    padding = -labels.size % chunk

    def chunks(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    def body(total, xs):
        features, labels, weights = xs
        losses = _losses(features, labels, logits, slices)
        return total + jnp.sum(jnp.where(weights, losses, 0.0)), None

    with jax.named_scope("loss"):
        total, _ = lax.scan(body, jnp.float32(0), (chunks(features), chunks(labels), chunks(weights)))
    return total, jnp.sum(weights, dtype=jnp.int32)


def _losses(features, labels, logits: Logits, slices: VocabSlices | None) -> Float[Array, " N"]:
    """The losses of one chunk of tokens, by a running log-sum-exp over the slices."""
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
