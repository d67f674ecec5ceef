"""Sorting rows by expert into tiles of one expert each, and bringing the experts' answers back.

A layer sorts once. Gate, up, activation and down are computed on the tiles, as are the adapters' updates; the tiles'
padding is zeros at the start, and what becomes of it is never read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

SMALLEST_SIDE, LARGEST_SIDE = 8, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Where T·k pairs of a token and one of its k experts lie in `tiles` tiles of `side` rows.

    Attributes:
      expert: int32 `[tiles]`, ascending. Tiles beyond the last that is needed are all padding.
      source: int32 `[tiles, side]`, the pair t·k + j in each row, T·k in padding. Pairs keep their order in an expert.
      place: int32 `[T, k]`, the row (tile · side + row in the tile) of each pair.
      experts: E.
    """

    expert: Any
    source: Any
    place: Any
    experts: int = dataclasses.field(metadata={"static": True})


def route_rows(index: Int[Array, "T k"], experts: int, side: int | None = None) -> Routing:
    """Tiles for the experts that a router has chosen.

    Args:
      index: each token's experts, from 0 to `experts` - 1.
      side: rows of a tile; `side_for` where None.
    """
    pairs = index.size
    side = side or side_for(pairs, experts)
    count = tile_count(pairs, experts, side)
    flat, every = index.reshape(-1).astype(jnp.int32), jnp.arange(experts, dtype=jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    in_order = flat[order]
    first, end = (jnp.searchsorted(in_order, every, side=s).astype(jnp.int32) for s in ("left", "right"))
    last_tile = jnp.cumsum(-(-(end - first) // side), dtype=jnp.int32)
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), last_tile[:-1]])

    tile = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right").astype(jnp.int32), experts - 1)
    start = first[expert] + (tile - first_tile[expert]) * side
    position = start[:, None] + jnp.arange(side, dtype=jnp.int32)
    source = jnp.where(position < end[expert][:, None], order[jnp.minimum(position, pairs - 1)], pairs)

    # Where in the order each pair stands.
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    place = first_tile[flat] * side + rank - first[flat]
    return Routing(expert=expert, source=source, place=place.reshape(index.shape), experts=experts)


def side_for(pairs: int, experts: int) -> int:
    """Rows of a tile: the power of two that holds an average expert's rows, from 8 to 128.

    An expert is dequantized once for each of its tiles, so tiles should be as large as its rows are many; but half a
    tile of each expert is padding, so no larger. 8 is what tensor cores take at least, and a fused kernel's fewest
    rows; at 128, the product takes about as long as writing and reading the dequantized expert.
    """
    average = -(-pairs // experts)
    return min(max(1 << (average - 1).bit_length(), SMALLEST_SIDE), LARGEST_SIDE)


def tile_count(pairs: int, experts: int, side: int) -> int:
    """The most tiles that any routing needs: each expert that has rows at all has at most one that is not full."""
    return (pairs + min(experts, pairs) * (side - 1)) // side


@jax.custom_vjp
def gather(x: Float[Array, "T D"], routing: Routing) -> Float[Array, "tiles side D"]:
    """Each tile's rows of x, zeros in the padding."""
    token = jnp.minimum(routing.source // routing.place.shape[1], len(x) - 1)
    return jnp.where(_filled(routing), x[token], 0)


def _gather_forward(x, routing):
    return gather(x, routing), routing


def _gather_backward(routing, dy):
    # Every token reads its k rows: no scatter, whose sums on GPUs depend on the order of atomic additions.
    return _picked(dy, routing).astype(jnp.float32).sum(1).astype(dy.dtype), None


gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def combine(y: Float[Array, "tiles side D"], weights: Float[Array, "T k"], routing: Routing) -> Float[Array, "T D"]:
    """out[t] = Σⱼ weights[t, j] · y of pair (t, j): added in float32, rounded once to the dtype of y."""
    wide = _picked(y, routing).astype(jnp.float32) * weights.astype(jnp.float32)[..., None]
    return wide.sum(1).astype(y.dtype)


def _combine_forward(y, weights, routing):
    return combine(y, weights, routing), (y, weights, routing)


def _combine_backward(kept, d):
    y, weights, routing = kept
    wide = d.astype(jnp.float32)
    d_weights = jnp.sum(_picked(y, routing).astype(jnp.float32) * wide[:, None], axis=-1)
    pair = jnp.minimum(routing.source, weights.size - 1)
    rows = wide[pair // weights.shape[1]] * weights.reshape(-1).astype(jnp.float32)[pair][..., None]
    dy = jnp.where(_filled(routing), rows, 0).astype(y.dtype)
    return dy, d_weights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def per_tile(stack: Float[Array, "E *D"], routing: Routing) -> Float[Array, "tiles *D"]:
    """Of what is small for each expert (a bias, an adapter's A or B) the part of each tile's expert."""
    return stack[routing.expert]


def _per_tile_forward(stack, routing):
    return per_tile(stack, routing), routing


def _per_tile_backward(routing, dy):
    # Sums as a product with ones and zeros: exact in any dtype, and in the same order every time.
    member = (routing.expert[:, None] == jnp.arange(routing.experts)).astype(dy.dtype)
    sums = jnp.einsum(
        "nE,nD->ED",
        member,
        dy.reshape(len(dy), -1),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return sums.astype(dy.dtype).reshape(-1, *dy.shape[1:]), None


per_tile.defvjp(_per_tile_forward, _per_tile_backward)


def regroup(tiles: Float[Array, "n m D"], old: Routing, new: Routing) -> Float[Array, "p q D"]:
    """The rows of one routing's tiles in the tiles of another one of the same pairs; zeros in the padding."""
    row = old.place.reshape(-1)[jnp.minimum(new.source, old.place.size - 1)]
    return jnp.where(_filled(new), tiles.reshape(-1, tiles.shape[-1])[row], 0)


def _filled(routing: Routing) -> Any:
    return (routing.source < np.int32(routing.place.size))[..., None]


def _picked(tiles, routing: Routing) -> Any:
    """`[T, k, D]`: the row of each pair."""
    return tiles.reshape(-1, tiles.shape[-1])[routing.place]
