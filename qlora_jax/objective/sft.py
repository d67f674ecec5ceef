"""Supervised fine-tuning: the negative log-likelihood of the scored tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.config import Pieces, VocabSlices
from qlora_jax.models import Decoder
from qlora_jax.objective.objective import MODEL_ARRAYS, Arrays, Measured, run_model
from qlora_jax.objective.tokens import Logits, chunk_losses, in_chunks


class SFT:
    """The mean over all scored tokens of a batch, whatever microbatch or row they are in."""

    arrays = (*MODEL_ARRAYS, "scored")

    def zeros(self) -> dict[str, Array]:
        """Of nothing: no loss, no tokens."""
        return {"loss": jnp.float32(0), "tokens": jnp.int32(0)}

    def measure(self, model: Decoder, batch: Arrays, pieces: Pieces, key: Array | None = None) -> Measured:
        """`loss`: the sum over the scored tokens; `tokens`: their number. The total has the model's own loss, too."""
        hidden, own = run_model(model, batch, pieces, key)
        total, count = next_token_loss(
            hidden,
            batch["tokens"],
            batch["scored"],
            model.logits,
            chunk=pieces.loss_chunk,
            slices=pieces.vocab_slices(model.config.vocab_size),
        )
        # Weighted as its tokens are, the model's own loss is a mean, too.
        return Measured(total if own is None else total + own * count, {"loss": total, "tokens": count})

    def weight(self, sums: Mapping[str, Any]) -> Any:
        """The number of scored tokens, at least 1."""
        return sums["tokens"] + (sums["tokens"] == 0)  # the same words for arrays and for numbers

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss` (mean) and `tokens` (scored)."""
        return {"loss": sums["loss"] / self.weight(sums), "tokens": sums["tokens"]}


def next_token_loss(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    logits: Logits,
    *,
    chunk: int,
    slices: VocabSlices | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed negative log-likelihood of the scored tokens, each predicted from the one before it, and their number."""

    def body(total, xs):
        features, labels, weights = xs
        losses = chunk_losses(features, labels, logits, slices)
        return total + jnp.sum(jnp.where(weights, losses, 0.0)), None

    weights = scored[:, 1:]
    with jax.named_scope("loss"):
        total, _ = lax.scan(body, jnp.float32(0), in_chunks(chunk, hidden[:, :-1], tokens[:, 1:], weights))
    return total, jnp.sum(weights, dtype=jnp.int32)
