"""Attention in memory linear in the length, in plain JAX: the scores exist one square tile at a time.

The tiles are FlashAttention's (arXiv:2205.14135, 2307.08691): a running maximum and sum in the forward pass, the
probabilities recomputed from their log-sum-exp in the backward pass. Tiles without a visible pair are not computed, so
the work follows the documents and windows of a row, too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Bounds of a tile's side. With 32 heads, the float32 scores of a tile of 512 take 34 MB, which the L2 caches of an H200
# and an RTX 4090 hold. Not timed on a GPU.
SHORTEST, LONGEST = 64, 512
# What a tile may take: its scores, and its queries' sums of values, which are as large as the scores where a head's
# size is the side. 32 heads of 512 (the largest of a released model) just fit with the longest side.
TILE_BYTES = 64 * 2**20
LOWEST = float(jnp.finfo(jnp.float32).min)
FLOAT32: Any = dict(preferred_element_type=jnp.float32)
zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


class Rule(NamedTuple):
    """What is static about an attention: the factor and the soft cap (0: none) of its scores, and the tile's side."""

    scale: float
    soft_cap: float
    chunk: int


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    start: Int[Array, "B T"],
    offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T N H"]:
    """What `reference.forward` computes, in tiles of at most `chunk` on a side (None: what TILE_BYTES allows)."""
    batch, length, heads, size = q.shape
    chunk = tile_side(length, longest_side(heads, size) if chunk is None else chunk)
    grouped = _padded(q.reshape(batch, length, k.shape[2], -1, size), chunk)
    k, v = _padded(k, chunk), _padded(v, chunk)
    start = _padded(start, chunk, k.shape[1])  # a padding query sees no key
    offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), batch)
    by_group = None if sinks is None else sinks.reshape(k.shape[2], -1)
    y = _attend(Rule(scale, soft_cap, chunk), grouped, k, v, start, offset, by_group)
    return y[:, :length].reshape(q.shape)


def longest_side(heads: int, size: int) -> int:
    """The longest side whose tiles stay within TILE_BYTES: a power of two, which most lengths are multiples of."""
    side = LONGEST
    while side > SHORTEST and 4 * heads * side * (side + size) > TILE_BYTES:
        side //= 2
    return side


def tile_side(length: int, longest: int) -> int:
    """The side that splits a length with the least padding: a multiple of 64 where `longest` is one."""
    even = -(-length // -(-length // longest))
    return min(longest, -(-even // 64) * 64)


def _padded(x: Array, multiple: int, value: int = 0) -> Array:
    """x with its second axis filled up to a multiple."""
    missing = -x.shape[1] % multiple
    widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q, k, v, start, offset, sinks) -> Float[Array, "B T K G H"]:
    return _attend_forward(rule, q, k, v, start, offset, sinks)[0]


def _attend_forward(rule: Rule, q, k, v, start, offset, sinks):
    # Rows one after another: the tiles' memory does not grow with the batch, and each row skips its own tiles.
    y, log_sum = lax.map(lambda row: _row_forward(rule, sinks, *row), (offset, q, k, v, start))
    return y, (q, k, v, start, offset, sinks, y, log_sum)


def _attend_backward(rule: Rule, residuals, dy):
    q, k, v, start, offset, sinks, y, log_sum = residuals
    delta = jnp.einsum("BTKGH,BTKGH->BKGT", y, dy, preferred_element_type=jnp.float32)
    rows = (offset, q, k, v, start, dy, log_sum, delta)
    dq, dk, dv = lax.map(lambda row: _row_backward(rule, *row), rows)
    return dq, dk, dv, None, None, sinks_gradient(sinks, log_sum, delta)


def sinks_gradient(
    sinks: Float[Array, "*N"] | None, log_sum: Float[Array, "B *N T"], delta: Float[Array, "B *N T"]
) -> Float[Array, "*N"] | None:
    """The sinks' gradient: a sink is a key whose value is zero, so that its weight only takes from the others.

    Args:
      log_sum: the log-sum-exp of each query's scores, its sink among them.
      delta: each query's output times its cotangent.
    """
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32)[..., None] - log_sum)
    return -(weights * delta).sum((0, -1)).astype(sinks.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _row_forward(rule: Rule, sinks, offset, q: Float[Array, "T K G H"], k: Float[Array, "S K H"], v, start):
    """One row's output and the log-sum-exp `[K, G, T]` of its scores and sinks (0 where a query has neither)."""

    def one_chunk(_, xs):
        index, q, start = xs

        def one_tile(j, carry):
            top, total, y = carry
            scores, _ = _scores(rule, q, _chunk(k, j, rule), start, offset, index, j)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            fade = jnp.exp(top - higher)
            part = jnp.einsum("KGts,sKH->KGtH", weights.astype(v.dtype), _chunk(v, j, rule), **FLOAT32)
            return higher, total * fade + weights.sum(-1), y * fade[..., None] + part

        shape = (*q.shape[1:3], rule.chunk)
        carry = *_before_any_key(sinks, shape), zeros((*shape, q.shape[-1]))
        first, after = _tiles(rule, k, start, offset, index)
        top, total, y = lax.fori_loop(first, after, one_tile, carry)
        seen = total > 0
        total = jnp.where(seen, total, 1)
        y = (y / total[..., None]).transpose(2, 0, 1, 3).astype(q.dtype)
        return None, (y, jnp.where(seen, top + jnp.log(total), 0.0))

    y, log_sum = lax.scan(one_chunk, None, _chunks(rule, q, start))[1]
    return y.reshape(q.shape), jnp.moveaxis(log_sum, 0, 2).reshape(*q.shape[1:3], -1)


def _before_any_key(sinks: Float[Array, "K G"] | None, shape: tuple[int, int, int]):
    """The running maximum and sum `[K, G, t]` at the start: of no score, or of the sink, whose value is zero."""
    if sinks is None:
        return jnp.full(shape, LOWEST, jnp.float32), zeros(shape)
    return jnp.broadcast_to(sinks.astype(jnp.float32)[..., None], shape), jnp.ones(shape, jnp.float32)


def _row_backward(
    rule: Rule, offset, q: Float[Array, "T K G H"], k: Float[Array, "S K H"], v, start, dy, log_sum, delta
):
    """One row's gradients of q, k and v."""

    def one_chunk(carry, xs):
        index, q, start, dy, log_sum, delta = xs

        def one_tile(j, carry):
            dq, dk, dv = carry
            key, value = _chunk(k, j, rule), _chunk(v, j, rule)
            scores, slope = _scores(rule, q, key, start, offset, index, j)
            weights = jnp.exp(scores - log_sum[..., None])
            dweights = jnp.einsum("tKGH,sKH->KGts", dy, value, **FLOAT32)
            dscores = (weights * (dweights - delta[..., None]) * slope).astype(q.dtype)
            dq += jnp.einsum("KGts,sKH->tKGH", dscores, key, **FLOAT32)
            dk = _add(dk, j, rule, jnp.einsum("KGts,tKGH->sKH", dscores, q, **FLOAT32))
            dv = _add(dv, j, rule, jnp.einsum("KGts,tKGH->sKH", weights.astype(dy.dtype), dy, **FLOAT32))
            return dq, dk, dv

        first, after = _tiles(rule, k, start, offset, index)
        dq, dk, dv = lax.fori_loop(first, after, one_tile, (zeros(q.shape), *carry))
        return (dk, dv), dq.astype(q.dtype)

    by_chunk = (jnp.moveaxis(x.reshape(*x.shape[:2], -1, rule.chunk), 2, 0) for x in (log_sum, delta))
    xs = (*_chunks(rule, q, start, dy), *by_chunk)
    (dk, dv), dq = lax.scan(one_chunk, (zeros(k.shape), zeros(v.shape)), xs)
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(rule: Rule, q: Float[Array, "t K G H"], k: Float[Array, "s K H"], start, offset, index, j):
    """A tile's float32 scores `[K, G, t, s]`, -inf where hidden, and their derivative by the plain q · k."""
    scores = jnp.einsum("tKGH,sKH->KGts", q, k, **FLOAT32) * rule.scale
    slope: Array | float = rule.scale
    if rule.soft_cap:
        bent = jnp.tanh(scores / rule.soft_cap)
        scores, slope = rule.soft_cap * bent, rule.scale * (1 - bent * bent)
    side = jnp.arange(rule.chunk)
    keys, own = j * rule.chunk + side, offset + index * rule.chunk + side
    visible = (keys >= start[:, None]) & (keys <= own[:, None])
    return jnp.where(visible, scores, -jnp.inf), slope


def _tiles(rule: Rule, k, start, offset, index):
    """The first tile that a chunk of queries needs, and the one after the last."""
    last = (offset + (index + 1) * rule.chunk - 1) // rule.chunk
    return start.min() // rule.chunk, jnp.minimum(last + 1, k.shape[0] // rule.chunk)


def _chunks(rule: Rule, *arrays):
    """What a scan over chunks of queries takes: their numbers and the arrays' chunks."""
    split = [x.reshape(-1, rule.chunk, *x.shape[1:]) for x in arrays]
    return (jnp.arange(split[0].shape[0], dtype=jnp.int32), *split)


def _chunk(x, j, rule: Rule):
    return lax.dynamic_slice_in_dim(x, j * rule.chunk, rule.chunk)


def _add(x, j, rule: Rule, part):
    return lax.dynamic_update_slice_in_dim(x, _chunk(x, j, rule) + part, j * rule.chunk, 0)
