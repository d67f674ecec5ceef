"""Cross-entropy over hidden states, a chunk of tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Logits = Callable[[Float[Array, "N D"]], Float[Array, "N V"]]


def next_token_loss(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    logits: Logits,
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed negative log-likelihood of the scored tokens, each predicted from the one before it, and their number.

    The logits of `chunk` tokens exist at a time, in the backward pass too: `[B, T, V]` never does.
    """
    features = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels, weights = tokens[:, 1:].reshape(-1), scored[:, 1:].reshape(-1)
    padding = -labels.size % chunk

    def chunks(x):
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    @jax.checkpoint
    def body(total, xs):
        features, labels, weights = xs
        scores = logits(features)
        label_scores = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - label_scores
        return total + jnp.sum(jnp.where(weights, losses, 0.0)), None

    with jax.named_scope("loss"):
        total, _ = lax.scan(body, jnp.float32(0), (chunks(features), chunks(labels), chunks(weights)))
    return total, jnp.sum(weights, dtype=jnp.int32)
