"""The train step of a configuration, with shapes in place of arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.models.adapters import add_adapters
from qlora_jax.models.config import DTYPES
from qlora_jax.train.config import Config
from qlora_jax.train.gradients import TensorBatch
from qlora_jax.train.optimizer import learning_rate
from qlora_jax.train.setup import lora_config, quantization, step_and_state
from qlora_jax.train.step import split_model


def abstract_train_step(config: Config) -> tuple[Any, tuple]:
    """The jitted step and its abstract arguments (adapters, optimizer state, base, batch, key) for `config`.

    With optim.offload=host the step is a PagedStep, which lowers and compiles like a jitted function. Its memory is
    that of its largest program with all that lies on the device meanwhile, without the pages in host memory. Not shown
    by compiling: that the runtime gives a page's device memory to the next page, and how fast pages come and go.
    """
    geometry = read_config(Path(config.model.geometry))
    model = abstract_model(geometry, dtype=DTYPES[config.model.dtype], quantization=quantization(config))

    add_adapters(model, lora_config(config), jax.random.key(config.seed))
    parts = split_model(model)
    step, init = step_and_state(config, parts, learning_rate(config.optim, 1000))
    state = jax.eval_shape(init)
    section = config.train
    shape = (section.grad_accum, section.batch_size, section.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = TensorBatch(ids, ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool_))
    return step, (parts.adapters, state, parts.base, batch, None)
