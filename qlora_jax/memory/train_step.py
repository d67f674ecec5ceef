"""The train step of a configuration, with shapes in place of arrays."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.data import ARRAYS
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.blocks.linear import Frozen
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.objective import objective_of
from qlora_jax.quant.host_table import host_table
from qlora_jax.training.optimizer import learning_rate
from qlora_jax.training.setup import embedding_on_host, planned_forms, step_and_state, storage_rules
from qlora_jax.training.step import Parts, split_model

# The rate's schedule keeps no array, whatever the length of the run.
STEPS = 1000


class AbstractState(NamedTuple):
    """What a run keeps between its steps, as shapes, and what a step does with it.

    Attributes:
      parts: the model, taken apart.
      train_step: the jitted step, or a PagedStep.
      opt_state: Optax' state over what is trained, or a HostState.
    """

    parts: Parts
    train_step: Any
    opt_state: Any


def abstract_state(config: Config, model_config: ModelConfig) -> AbstractState:
    """Base, adapters and optimizer state of `config` for a model of this geometry; nothing is allocated."""
    kind = nnx.Param if config.method == "full" else Frozen
    model = abstract_model(
        model_config,
        dtype=DTYPES[config.model.dtype],
        rules=storage_rules(config),
        kind=kind,
        host_embedding=embedding_on_host(config),
        forms=planned_forms(config, model_config),
    )
    parts = split_model(model) if config.method == "full" else _with_adapters(model, config)
    train_step, init = step_and_state(config, parts, learning_rate(config.optim, STEPS))
    return AbstractState(parts, train_step, jax.eval_shape(init))


def _with_adapters(model: Decoder, config: Config) -> Parts:
    graphdef, base = nnx.split(model)

    def adapt(base):
        adapted: Decoder = nnx.merge(graphdef, base)
        add_adapters(adapted, config.lora, jax.random.key(config.seed))
        return split_model(adapted)

    return jax.eval_shape(adapt, base)


def abstract_batch(config: Config, base: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one optimizer step's arrays, `[grad_accum, batch_size, seq_len]`, for this frozen state."""
    section = config.train
    shape = (section.grad_accum, section.batch_size, section.seq_len)
    arrays = {name: jax.ShapeDtypeStruct(shape, ARRAYS[name]) for name in objective_of(config).arrays}
    table = host_table(base)
    return arrays if table is None else arrays | {"embedded": table.rows_shape(shape)}


def dropout_key(config: Config) -> Any:
    """The shape of the step's dropout key; None where no dropout needs one."""
    if config.lora.dropout == 0 or config.method == "full":
        return None
    return jax.eval_shape(lambda: jax.random.key(config.seed))


def abstract_train_step(config: Config) -> tuple[Any, tuple]:
    """The jitted step and its abstract arguments (trained, optimizer state, base, batch, key) for `config`.

    With optim.offload=host the step is a PagedStep, which lowers and compiles like a jitted function. Its memory is
    that of its largest program with all that lies on the device meanwhile, without the pages in host memory. Not shown
    by compiling: that the runtime gives a page's device memory to the next page, and how fast pages come and go.
    """
    parts, train_step, opt_state = abstract_state(config, read_config(Path(config.model.geometry)))
    return train_step, (parts.trained, opt_state, parts.base, abstract_batch(config, parts.base), dropout_key(config))
