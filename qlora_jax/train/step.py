"""One optimizer step and one evaluation step, as pure functions of pytrees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from qlora_jax.lora.tree import lora_mask
from qlora_jax.models.adapters import TRAINABLE
from qlora_jax.models.decoder import Decoder
from qlora_jax.train.loss import next_token_loss, vocab_slices
from qlora_jax.train.optimizer import fill_frozen, make_optimizer


class Parts(NamedTuple):
    """A model taken apart at the jit boundary.

    Attributes:
      graphdef: its structure, static.
      adapters: what is trained (in a full fine-tune: the weights).
      base: everything else, frozen.
    """

    graphdef: nnx.GraphDef
    adapters: Any
    base: Any

    def merge(self) -> Decoder:
        """The model again."""
        return nnx.merge(self.graphdef, self.adapters, self.base)


def split_model(model: Decoder) -> Parts:
    """The model's structure, trainable state and frozen state."""
    return Parts(*nnx.split(model, TRAINABLE, ...))


class TensorBatch(NamedTuple):
    """A batch on the device: int32 and bool `[A, B, T]`, see data.Batch."""

    tokens: Any
    segment_ids: Any
    positions: Any
    scored: Any


def masked_optimizer(tx: optax.GradientTransformation, parts: Parts) -> optax.GradientTransformation:
    """`tx` over the whole tree `(adapters, base)`, masked to the adapters."""
    return make_optimizer(tx, lora_mask((parts.adapters, parts.base)))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    remat: str,
    loss_chunk: int,
    vocab_chunk: int = 0,
    mlp_chunk: int = 0,
) -> jax.stages.Wrapped:
    """The jitted `train_step(adapters, opt_state, base, batch, key) -> (adapters, opt_state, metrics)`.

    adapters and opt_state are donated; base is only read. Gradients are taken with respect to the adapters alone,
    summed over the microbatches and divided once by the number of scored tokens, so that accumulating equals one
    larger batch. `key` turns adapter dropout on, None leaves it off. metrics: `loss`, `tokens` (scored) and
    `grad_norm` (before clipping).
    """

    def loss(adapters, base, batch, key):
        model = nnx.merge(graphdef, adapters, base)
        hidden = model.hidden(
            batch.tokens, batch.positions, batch.segment_ids, remat=remat, mlp_chunk=mlp_chunk, key=key
        )
        slices = vocab_slices(vocab_chunk, model.config.vocab_size)
        return next_token_loss(hidden, batch.tokens, batch.scored, model.logits, chunk=loss_chunk, slices=slices)

    def train_step(adapters, opt_state, base, batch, key):
        total, count, grads = _accumulate(jax.value_and_grad(loss, has_aux=True), adapters, base, batch, key)
        scored = jnp.maximum(count, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g, p: (g / scored).astype(p.dtype), grads, adapters)
        metrics = {"loss": total / scored, "tokens": count, "grad_norm": optax.tree.norm(grads)}
        whole = fill_frozen((grads, jax.tree.map(lambda _: None, base)), (adapters, base))
        updates, opt_state = optimizer.update(whole, opt_state, (adapters, base))
        return optax.apply_updates(adapters, updates[0]), opt_state, metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def _accumulate(value_and_grad, adapters, base, batch: TensorBatch, key):
    """Loss sum, scored tokens and gradient sum over the microbatches."""

    def body(carry, xs):
        microbatch, index = xs
        dropout = None if key is None else jax.random.fold_in(key, index)
        (total, count), grads = value_and_grad(adapters, base, microbatch, dropout)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, adapters))
    carry, _ = lax.scan(body, zeros, (batch, jnp.arange(batch.tokens.shape[0])))
    return carry


def make_eval_step(graphdef: nnx.GraphDef, *, loss_chunk: int, vocab_chunk: int = 0) -> jax.stages.Wrapped:
    """The jitted `eval_step(adapters, base, batch) -> (summed loss, scored tokens)` of a batch `[B, T]`."""

    @jax.jit
    def eval_step(adapters, base, batch):
        model = nnx.merge(graphdef, adapters, base)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
        slices = vocab_slices(vocab_chunk, model.config.vocab_size)
        return next_token_loss(hidden, batch.tokens, batch.scored, model.logits, chunk=loss_chunk, slices=slices)

    return eval_step


def evaluate(eval_step, parts: Parts, batches) -> tuple[float, int]:
    """Mean negative log-likelihood over all scored tokens of `batches` (data.Batch with A = 1), and their number."""
    total, count = 0.0, 0
    for batch in batches:
        loss, scored = eval_step(parts.adapters, parts.base, TensorBatch(*(array[0] for array in batch)))
        total, count = total + float(loss), count + int(scored)
    return total / max(count, 1), count
