"""Attention with sinks, and with heads of all sizes: every implementation against the definition written out."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.attention import attend, chunked, hopper, reference
from qlora_jax.kernels.attention.dispatch import announce, choose
from tests.kernels.test_attention import operands, starts

SCALE = 0.3
LENGTH = 50
IMPLEMENTATIONS = {"tiles of 16": functools.partial(chunked.forward, chunk=16), "reference": reference.forward}
SINKS = jnp.asarray([1.5, -2.0, 0.0, 4.0, -30.0, 0.7], jnp.float32)
PLACE = np.arange(LENGTH)
# The first key that each of 50 tokens sees.
ROWS = {
    "packed": starts([9, 30, 11]),
    "packed, with windows": starts([9, 30, 11], window=6),
    "a chunked window": PLACE // 20 * 20,
    "a chunked window, packed": np.maximum(PLACE // 20 * 20, starts([25, 25])),
}


def by_hand(q, k, v, *, sinks, start, scale):
    """Attention one row and one head at a time, from the sums of exponentials."""

    def head(q, k, v, sink, start):
        visible = (start[:, None] <= PLACE) & (PLACE[:, None] >= PLACE)
        weights = jnp.where(visible, jnp.exp(q @ k.T * scale), 0)
        return weights @ v / (weights.sum(-1, keepdims=True) + jnp.exp(sink))

    group = q.shape[2] // k.shape[2]
    heads = [(n, n // group) for n in range(q.shape[2])]
    rows = [[head(q[b, :, n], k[b, :, m], v[b, :, m], sinks[n], start[b]) for n, m in heads] for b in range(q.shape[0])]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows])


@functools.partial(jax.jit, static_argnums=0, static_argnames=("scale", "soft_cap"))
def with_vjp(function, q, k, v, dy, sinks, start, **options):
    """The output and the gradients of q, k, v and the sinks."""

    def run(q, k, v, sinks):
        return function(q, k, v, sinks=sinks, start=start, **options)

    y, vjp = jax.vjp(run, q, k, v, sinks)
    return (y, *vjp(dy))


def assert_equal(actual, expected, tolerance=1e-5):
    for name, a, b in zip(("y", "dq", "dk", "dv", "dsinks"), actual, expected, strict=True):
        assert a.dtype == b.dtype
        atol = tolerance / 5 * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=name)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sinks_take_their_share_of_the_weights(implementation, heads, row):
    q, k, v, dy = operands(heads=heads[0], kv_heads=heads[1])
    start = jnp.asarray([ROWS[row], ROWS["packed"]])
    expected = with_vjp(by_hand, q, k, v, dy, SINKS, start, scale=SCALE)
    assert_equal(with_vjp(implementation, q, k, v, dy, SINKS, start, scale=SCALE), expected)


def test_sinks_where_queries_continue_a_text():
    q, k, v, dy = operands(queries=20, keys=LENGTH, heads=6)
    start = jnp.asarray([[0] * 20, [4] * 20])
    offset = jnp.asarray([9, 30])
    tiles, whole = (
        with_vjp(functools.partial(f, offset=offset), q, k, v, dy, SINKS, start, scale=SCALE, soft_cap=2.0)
        for f in IMPLEMENTATIONS.values()
    )
    assert_equal(tiles, whole)
    assert float(jnp.abs(whole[4]).min()) > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_query_that_sees_only_its_sink_gives_zero(implementation):
    q, k, v, dy = operands(batch=1, heads=6)
    start = (jnp.arange(LENGTH)[None] + 1).at[0, 40:].set(38)
    y, dq, _, _, dsinks = with_vjp(implementation, q, k, v, dy, SINKS, start, scale=SCALE)
    assert not np.any(y[0, :40]) and not np.any(dq[0, :40]) and np.all(y[0, 40:])
    louder = with_vjp(implementation, q, k, v, dy.at[0, :40].mul(1000), SINKS, start, scale=SCALE)
    assert np.isfinite(dsinks).all() and np.array_equal(dsinks, louder[4])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sinks_have_a_dtype_of_their_own(implementation, dtype):
    q, k, v, dy = operands(heads=6, dtype=jnp.bfloat16)
    start, sinks = jnp.asarray([ROWS["packed"]] * 2), SINKS.astype(dtype)
    exact = with_vjp(implementation, *(x.astype(jnp.float32) for x in (q, k, v, dy)), SINKS, start, scale=SCALE)
    with jax.numpy_dtype_promotion("strict"):
        results = with_vjp(implementation, q, k, v, dy, sinks, start, scale=SCALE)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 4 + [dtype]
    for a, b in zip(results, exact, strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) <= 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("heads", [(6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("size", [24, 96, 256, 512])
def test_heads_of_any_size(size, heads):
    q, k, v, dy = operands(heads=heads[0], kv_heads=heads[1], head_dim=size)
    start = jnp.asarray([ROWS["packed, with windows"], ROWS["a chunked window, packed"]])
    for soft_cap in (0.0, 2.0):
        options = dict(scale=size**-0.5, soft_cap=soft_cap)
        tiles, whole = (with_vjp(f, q, k, v, dy, SINKS, start, **options) for f in IMPLEMENTATIONS.values())
        assert_equal(tiles, whole, tolerance=3e-5)  # long sums


@pytest.mark.parametrize(
    ("heads", "size", "side"),
    [(8, 64, 512), (32, 128, 512), (40, 128, 512), (32, 512, 512), (64, 64, 256), (128, 512, 128), (4096, 512, 64)],
)
def test_a_tile_takes_a_bounded_memory(heads, size, side):
    assert chunked.longest_side(heads, size) == side
    assert side == chunked.SHORTEST or 4 * heads * side * (side + size) <= chunked.TILE_BYTES


def test_attend_passes_sinks_on():
    for queries in (LENGTH, 130):
        q, k, v, _ = operands(queries=queries, heads=6)
        start = jnp.zeros((2, queries), jnp.int32)
        names = ("reference", "chunked") if queries == LENGTH else (None, "hopper")
        for name in names:  # where there is no GPU, "hopper" takes the tiles
            y = attend(q, k, v, start, scale=SCALE, sinks=SINKS, implementation=name)
            np.testing.assert_allclose(y, reference.forward(q, k, v, start, scale=SCALE, sinks=SINKS), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(head_dim=256), "heads of 256 need more registers"),
        (dict(head_dim=100), "heads of a multiple of 8, not 100"),
        (dict(dtype="float32"), "not in float32"),
        (dict(self_attention=False), "read no cache"),
        (dict(queries=2000), "a length of a multiple of 128"),
        (dict(capability=89, head_dim=256), None),
        (dict(), None),
    ],
    ids=str,
)
def test_the_log_says_once_why_a_kernel_does_not_run(changes, reason, caplog):
    usual = dict(queries=2048, head_dim=128, dtype="bfloat16", self_attention=True, capability=90, tokamax=True)
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="qlora_jax.kernels"):
        for _ in range(2):
            announce(choose(**{**usual, **changes}))
    (line,) = caplog.messages
    assert (reason in line) if reason else line.endswith(("XLA's", "for Hopper"))


def as_the_kernels_do(residuals, out, dout, q, k, v, *, logits_scale, mask, **_):
    """The derivative that tokamax's kernels for Hopper compute, from a maximum and a sum that they are given."""
    top, total = residuals
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    visible = mask.as_array(LENGTH, LENGTH)
    weights = jnp.exp(jnp.einsum("BTNH,BSNH->BNTS", q, k) * logits_scale - top[..., None]) / total[..., None]
    weights = jnp.where(visible, weights, 0)
    delta = jnp.einsum("BTNH,BTNH->BNT", out, dout)[..., None]
    dscores = weights * (jnp.einsum("BTNH,BSNH->BNTS", dout, v) - delta) * logits_scale
    dq = jnp.einsum("BNTS,BSNH->BTNH", dscores, k)
    dk, dv = jnp.einsum("BNTS,BTNH->BSNH", dscores, q), jnp.einsum("BNTS,BTNH->BSNH", weights, dout)
    by_group = (2, LENGTH, 2, -1, q.shape[3])
    return {"q": dq, "k": dk.reshape(by_group).sum(3), "v": dv.reshape(by_group).sum(3)}


def test_sinks_in_what_tokamax_returns():
    """By its plain-JAX form, which returns what its kernels do; those run in test_attention_on_gpus.py."""
    pytest.importorskip("tokamax", reason="tokamax needs Python 3.12")
    from tokamax._src.ops.attention.base import DotProductAttention

    q, k, v, dy = operands(heads=6)
    start = jnp.asarray([ROWS["packed, with windows"], ROWS["packed"]])
    kernel = hopper.Kernel(DotProductAttention(vjp=as_the_kernels_do), SCALE, 0.0)

    def run(q, k, v, *, sinks, start):
        return hopper.run(kernel, q, k, v, start, sinks)

    expected = with_vjp(reference.forward, q, k, v, dy, SINKS, start, scale=SCALE)
    assert_equal(with_vjp(run, q, k, v, dy, SINKS, start), expected)
