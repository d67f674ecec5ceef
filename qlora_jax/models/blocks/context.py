"""What the mixers of a forward pass share, and what differs from layer to layer."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.specs import Rope


class Context(NamedTuple):
    """What every layer of one forward pass shares. Keys are numbered by their place in the row, or in the cache.

    Attributes:
      positions: int32 `[B, T]`, each token's place in its document.
      ropes: cos and sin of the tokens' positions, for every rotation that the layers have.
      first: int32 `[B, T]`, the first key that a token may look at, windows aside: where its document begins.
      start: which key the first token is: 0, or where there is a cache a traced int32, a scalar or one for each row.
      counts: how many of the tokens count in each row; the rest is padding behind them. None where all do.
      row: the only row of the cache that the tokens are for; None where there are some for each.
      counted: which tokens the balance of experts is about, padding not; None where nobody asks for it.
    """

    positions: Int[Array, "B T"]
    ropes: dict[Rope, tuple[Array, Array]]
    first: Int[Array, "B T"]
    start: int | Int[Array, ""] | Int[Array, " B"]
    counts: Int[Array, ""] | Int[Array, " B"] | None = None
    row: Int[Array, ""] | None = None
    counted: Bool[Array, "B T"] | None = None


class Own(NamedTuple):
    """What a layer has of its own besides its weights, as data: layers of one kind are scanned together.

    Attributes:
      place: which layer of its stack it is.
      window: how many tokens back attention reaches; 0 for all of them.
      rope: which of its stack's rotations it has.
      extra: its own inputs, of a model with PerLayerInputs.
      key: for dropout, or None.
    """

    place: Int[Array, ""]
    window: Int[Array, ""]
    rope: Int[Array, ""]
    extra: Float[Array, "B T P"] | None = None
    key: Any = None


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where in its row each token's document begins. A document is a run of one segment id."""
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(begins, places, 0), axis=1)


def document_lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens each token's document has, up to the last of them in its row: that one's position and one."""
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    last = lax.cummin(jnp.where(ends, places, segments.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def first_keys(context: Context, window: Int[Array, ""]) -> Int[Array, "B T"]:
    """The first key that each token sees: of its document, and among the last `window` (0: no limit)."""
    place = jnp.reshape(context.start, (-1, 1)) + jnp.arange(context.first.shape[1], dtype=jnp.int32)
    return jnp.where(window == 0, context.first, jnp.maximum(context.first, place - window + 1))


def row_counts(context: Context, rows: int) -> Int[Array, " B"] | None:
    """How many of the tokens count in each of the rows; None where all do."""
    return None if context.counts is None else jnp.broadcast_to(context.counts, (rows,))
