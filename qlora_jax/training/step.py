"""One optimizer step and one evaluation step, as pure functions of pytrees."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from qlora_jax.config import Pieces
from qlora_jax.data import Batch
from qlora_jax.models.adapters import TRAINABLE
from qlora_jax.models.decoder import Decoder
from qlora_jax.objective import Objective
from qlora_jax.training.batch import to_device
from qlora_jax.training.gradients import make_gradients


class Parts(NamedTuple):
    """A model taken apart at the jit boundary.

    Attributes:
      graphdef: its structure, static.
      trained: the adapters, in a full fine-tune the weights.
      base: everything else, frozen.
    """

    graphdef: nnx.GraphDef
    trained: Any
    base: Any

    def merge(self) -> Decoder:
        """The model again."""
        return nnx.merge(self.graphdef, self.trained, self.base)


def split_model(model: Decoder) -> Parts:
    """The model's structure, trainable state and frozen state."""
    return Parts(*nnx.split(model, TRAINABLE, ...))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    pieces: Pieces,
    gradients: Any = None,
) -> jax.stages.Wrapped:
    """The jitted `train_step(trained, opt_state, base, batch, key) -> (trained, opt_state, metrics)`.

    trained and opt_state (`optimizer.init(trained)`) are donated; base is only read. Gradients are summed over the
    microbatches (in the dtype `gradients`; None: each parameter's own) and divided once by the objective's weight, so
    that accumulating equals one larger batch. An optimizer that takes a `norm` is handed the gradient's. `key` turns
    adapter dropout on, None leaves it off. metrics: the objective's, and `grad_norm` (before clipping).
    """
    differentiate = make_gradients(graphdef, objective, pieces, gradients)
    update = optax.with_extra_args_support(optimizer).update

    def train_step(trained, opt_state, base, batch, key):
        found = differentiate(trained, base, batch, key)
        updates, opt_state = update(found.mean(like=trained), opt_state, trained, norm=found.metrics["grad_norm"])
        return optax.apply_updates(trained, updates), opt_state, found.metrics

    return jax.jit(train_step, donate_argnums=(0, 1))


class EvalStep(NamedTuple):
    """An objective, and the jitted `sums(trained, base, batch)`: its sums of a batch `[B, T]`."""

    objective: Objective
    sums: jax.stages.Wrapped


def make_eval_step(graphdef: nnx.GraphDef, objective: Objective, pieces: Pieces) -> EvalStep:
    """What `evaluate` measures a model of this structure with."""

    @jax.jit
    def sums(trained, base, batch):
        return objective.measure(nnx.merge(graphdef, trained, base), batch, pieces.of_loss()).sums

    return EvalStep(objective, sums)


def evaluate(step: EvalStep, parts: Parts, batches: Iterable[Batch]) -> dict[str, float]:
    """The objective's metrics over all `batches` (with A = 1)."""
    objective = step.objective
    sums = {name: zero.item() for name, zero in objective.zeros().items()}
    for batch in batches:
        one = {name: array[0] for name, array in batch.items()}
        found = step.sums(parts.trained, parts.base, to_device(one, objective.arrays, parts.base))
        for name, value in jax.device_get(found).items():
            sums[name] += value.item()
    return objective.metrics(sums)
