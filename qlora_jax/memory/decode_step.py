"""The step that generates one token, with shapes in place of arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import Config
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import read_config
from qlora_jax.models.cache import empty_cache
from qlora_jax.models.config import DTYPES
from qlora_jax.models.decoder import Decoder
from qlora_jax.training.setup import planned_forms, storage_rules


def abstract_decode_step(config: Config, batch: int, places: int) -> tuple[Any, tuple]:
    """The jitted greedy step of the base model, and its abstract arguments (base, cache, tokens).

    Args:
      batch: texts that are generated at once.
      places: tokens that the cache has room for, in each text.

    Returns:
      The step gives the next token ids, int32 `[B, 1]`, and the cache, which is updated in place.
    """
    model_config = read_config(Path(config.model.geometry))
    dtype = DTYPES[config.model.dtype]
    forms = planned_forms(config, model_config)
    graphdef, base = nnx.split(abstract_model(model_config, dtype=dtype, rules=storage_rules(config), forms=forms))

    def decode_step(base, cache, tokens):
        model: Decoder = nnx.merge(graphdef, base)
        hidden, cache = model.step(tokens, cache)
        return jnp.argmax(model.logits(hidden), axis=-1), cache

    cache = jax.eval_shape(lambda: empty_cache(model_config, batch, places, dtype))
    ids = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return jax.jit(decode_step, donate_argnames="cache"), (base, cache, ids)
