"""Which layers of a decoder are scanned together: segments of a unit of layers that repeats.

Layers of one kind at the same place of a segment's unit are one stack of arrays. A decoder of equal layers is one
segment, whose unit is one layer; one in which every fourth layer differs is a segment with a unit of four.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import LayerKind

# What the only stack is called, and how the names of several begin.
STACK = "layers"
LONGEST_UNIT = 16


class Stack(NamedTuple):
    """Layers whose parameters lie in one stack.

    Attributes:
      name: the first part of their paths in our model.
      layers: their numbers in the decoder.
    """

    name: str
    layers: range
    kind: LayerKind


# The stacks of a unit's layers, in their order, all of the same length.
Segment = tuple[Stack, ...]


@functools.lru_cache(maxsize=64)
def segments(config: ModelConfig) -> tuple[Segment, ...]:
    """The segments of a decoder, in the order in which they run."""
    layers, found, start = config.layers, [], 0
    alike = [layer.alike for layer in layers]
    while start < len(layers):
        unit, repeats = _longest(alike[start:])
        found.append([(range(start + i, start + unit * repeats, unit), layers[start + i].kind) for i in range(unit)])
        start += unit * repeats
    single = len(found) == 1 and len(found[0]) == 1
    return tuple(
        tuple(Stack(STACK if single else f"{STACK}_{layers.start}", layers, kind) for layers, kind in unit)
        for unit in found
    )


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """The stacks of all segments."""
    return tuple(stack for segment in segments(config) for stack in segment)


def in_stack(name: str) -> bool:
    """Whether a path in our model that begins with this name is of a stack of layers."""
    return name == STACK or name.startswith(f"{STACK}_")


def _longest(kinds: Sequence[Any]) -> tuple[int, int]:
    """(length, repeats) of the unit that covers most layers from the first on; of equal ones the shortest."""
    best = (1, 1)
    for unit in range(1, min(LONGEST_UNIT, len(kinds)) + 1):
        repeats = 1
        while kinds[repeats * unit : (repeats + 1) * unit] == kinds[:unit]:
            repeats += 1
        # A unit that does not repeat is only a longer program.
        if (repeats > 1 or unit == 1) and unit * repeats > best[0] * best[1]:
            best = (unit, repeats)
    return best
