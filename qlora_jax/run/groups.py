"""Which of many texts are written at once: few shapes are compiled, and the cache has a limit."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qlora_jax.generation import bucket

# Texts that are written at once.
BATCH = 64
# Tokens, padding included, whose keys and values are kept at once: 8.6 GB for a 7B without grouped queries.
SLOTS = 16_384


class Group(NamedTuple):
    """Texts that are written at once: their indices, and these filled up to the rows that are compiled for."""

    rows: list[int]
    filled: list[int]


def groups(lengths: Sequence[int], new: int) -> Iterator[Group]:
    """Prompts of these lengths in groups, for up to `new` more tokens each.

    The longest come first: what does not fit the device says so at once. Filled up, the last group keeps the compiled
    shape.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    whole = len(left)
    while left:
        count = rows_at_once(lengths[left[0]], new)
        group, left = left[:count], left[count:]
        yield Group(group, group + [group[0]] * (count - len(group) if whole > count else 0))


def rows_at_once(prompt: int, new: int) -> int:
    """How many texts are written at once: a power of two, so that few shapes are compiled."""
    fitting = max(SLOTS // (bucket(prompt) + new), 1)
    return min(BATCH, 1 << (fitting.bit_length() - 1))
