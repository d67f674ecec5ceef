"""One optimizer step and one evaluation step, as pure functions of pytrees."""

from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from qlora_jax.lora.tree import lora_mask
from qlora_jax.models.adapters import TRAINABLE
from qlora_jax.models.decoder import Decoder
from qlora_jax.objective.tokens import next_token_loss, vocab_slices
from qlora_jax.training.batch import to_device
from qlora_jax.training.gradients import make_gradients
from qlora_jax.training.optimizer import fill_frozen, make_optimizer


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


def masked_optimizer(tx: optax.GradientTransformation, parts: Parts) -> optax.GradientTransformationExtraArgs:
    """`tx` over the whole tree `(adapters, base)`, masked to the adapters."""
    return make_optimizer(tx, lora_mask((parts.adapters, parts.base)))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    remat: str,
    loss_chunk: int,
    vocab_chunk: int = 0,
    mlp_chunk: int = 0,
    gradients: Any = None,
) -> jax.stages.Wrapped:
    """The jitted `train_step(adapters, opt_state, base, batch, key) -> (adapters, opt_state, metrics)`.

    adapters and opt_state are donated; base is only read. Gradients are taken with respect to the adapters alone,
    summed over the microbatches (in the dtype `gradients`; None: each parameter's own) and divided once by the number
    of scored tokens, so that accumulating equals one larger batch. `key` turns adapter dropout on, None leaves it off.
    metrics: `loss`, `tokens` (scored) and `grad_norm` (before clipping).
    """
    differentiate = make_gradients(
        graphdef, remat=remat, loss_chunk=loss_chunk, vocab_chunk=vocab_chunk, mlp_chunk=mlp_chunk, dtype=gradients
    )

    def train_step(adapters, opt_state, base, batch, key):
        found = differentiate(adapters, base, batch, key)
        whole = fill_frozen((found.mean(like=adapters), jax.tree.map(lambda _: None, base)), (adapters, base))
        updates, opt_state = optimizer.update(whole, opt_state, (adapters, base), norm=found.metrics["grad_norm"])
        return optax.apply_updates(adapters, updates[0]), opt_state, found.metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_eval_step(graphdef: nnx.GraphDef, *, loss_chunk: int, vocab_chunk: int = 0) -> jax.stages.Wrapped:
    """The jitted `eval_step(adapters, base, batch) -> (summed loss, scored tokens)` of a batch `[B, T]`."""

    @jax.jit
    def eval_step(adapters, base, batch):
        model = nnx.merge(graphdef, adapters, base)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids, embedded=batch.embedded)
        slices = vocab_slices(vocab_chunk, model.config.vocab_size)
        return next_token_loss(hidden, batch.tokens, batch.scored, model.logits, chunk=loss_chunk, slices=slices)

    return eval_step


def evaluate(eval_step, parts: Parts, batches) -> tuple[float, int]:
    """Mean negative log-likelihood over all scored tokens of `batches` (data.Batch with A = 1), and their number."""
    total, count = 0.0, 0
    for batch in batches:
        one = jax.tree.map(lambda array: array[0], batch)
        loss, scored = eval_step(parts.adapters, parts.base, to_device(one, parts.base))
        total, count = total + float(loss), count + int(scored)
    return total / max(count, 1), count
