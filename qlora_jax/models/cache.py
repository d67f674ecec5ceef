"""The cache of a generation, or of the texts that are being served."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from qlora_jax.models.blocks import MIXERS
from qlora_jax.models.blocks.key_values import Fresh
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.segments import Stack, stacks


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
        stack.name: MIXERS[type(stack.kind.mixer)].Cache.empty(
            stack.kind.mixer, len(stack.layers), batch, places, dtype
        )
        for stack in stacks(config)
        if stack.kind.source is None
    }
    return Cache(layers, jnp.int32(0))


def can_be_cut(config: ModelConfig) -> bool:
    """Whether a cached text can be cut back to its first tokens: all of it is kept by place, none in a state."""
    return all(MIXERS[type(kind.mixer)].CUTS for kind in config.kinds)


def fresh_key_values(config: ModelConfig, shape: tuple[int, ...], dtype) -> dict[str, Fresh]:
    """What a forward pass of `[B, T]` tokens without a cache keeps for layers that borrow, by the lenders' names."""
    lenders = {source_of(config, stack) for stack in stacks(config) if stack.kind.source is not None}
    specs: dict[str, Any] = {stack.name: stack.kind.mixer for stack in lenders}
    return {name: Fresh.empty(spec, shape, dtype) for name, spec in specs.items()}


def source_of(config: ModelConfig, stack: Stack) -> Stack:
    """The stack whose keys and values a stack's layers read: itself, or that from whose last layer they borrow."""
    source = stack.kind.source
    if source is None:
        return stack
    lender = next(one for one in stacks(config) if source in one.layers)
    if source != lender.layers[-1]:
        raise NotImplementedError(
            f"layers {stack.layers} borrow keys and values of {source}, not of {lender.layers[-1]}"
        )
    return lender
