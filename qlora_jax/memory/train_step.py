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
from qlora_jax.train.optimizer import adamw, learning_rate
from qlora_jax.train.setup import lora_config, loss_pieces, quantization
from qlora_jax.train.step import TensorBatch, make_train_step, masked_optimizer, split_model


def abstract_train_step(config: Config) -> tuple[Any, tuple]:
    """The jitted step and its abstract arguments (adapters, optimizer state, base, batch, key) for `config`."""
    geometry = read_config(Path(config.model.geometry))
    model = abstract_model(geometry, dtype=DTYPES[config.model.dtype], quantization=quantization(config))

    add_adapters(model, lora_config(config), jax.random.key(config.seed))
    parts = split_model(model)
    optimizer = masked_optimizer(adamw(config.optim, learning_rate(config.optim, 1000)), parts)
    state = jax.eval_shape(optimizer.init, (parts.adapters, parts.base))
    section = config.train
    step = make_train_step(parts.graphdef, optimizer, remat=section.remat, **loss_pieces(config))
    shape = (section.grad_accum, section.batch_size, section.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = TensorBatch(ids, ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool_))
    return step, (parts.adapters, state, parts.base, batch, None)
