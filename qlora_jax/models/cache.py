"""The cache of a generation, or of the texts that are being served."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from qlora_jax.models.blocks import MIXERS
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.segments import stacks


class Cache(NamedTuple):
    """What the mixers of all layers keep of the tokens seen so far.

    Attributes:
      layers: for each stack of layers, by its name, what its mixer's kind of cache is, such as KeyValues.
      length: int32 `[B]`, how many tokens each row holds; a scalar where all hold as many, which is written faster.
    """

    layers: dict[str, Any]
    length: Int[Array, ""] | Int[Array, " B"]


def empty_cache(config: ModelConfig, batch: int, places: int, dtype) -> Cache:
    """A cache for `batch` texts of at most `places` tokens."""
    layers = {
        stack.name: MIXERS[stack.kind.mixer].Cache.empty(config, len(stack.layers), batch, places, dtype)
        for stack in stacks(config)
    }
    return Cache(layers, jnp.int32(0))
