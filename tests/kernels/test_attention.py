"""Every implementation of attention on the CPU, forward and derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.attention import attend, chunked, hopper, reference
from qlora_jax.kernels.attention.dispatch import choose

SCALE = 0.3
LENGTH = 50
IMPLEMENTATIONS = {"tiles of 16": functools.partial(chunked.forward, chunk=16), "reference": reference.forward}


def operands(batch=2, queries=LENGTH, keys=None, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32):
    """q, k, v and the output's cotangent."""
    keys = queries if keys is None else keys
    lengths = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    random = np.random.default_rng(0)
    shapes = [(batch, length, count, head_dim) for length, count in lengths]
    return [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]


def starts(lengths, window=0):
    """The first visible key of each token of a row of documents."""
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return np.maximum(first, np.arange(len(first)) - window + 1) if window else first


@functools.partial(jax.jit, static_argnums=0, static_argnames=("scale", "soft_cap", "chunk", "implementation"))
def with_vjp(function, q, k, v, dy, *args, **options):
    """The output and the gradients of q, k and v."""
    y, vjp = jax.vjp(lambda q, k, v: function(q, k, v, *args, **options), q, k, v)
    return (y, *vjp(dy))


def assert_equal(actual, expected):
    for name, a, b in zip(("y", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * float(jnp.abs(b).max()), err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_each_row_has_an_offset_of_its_own(implementation):
    q, k, v, _ = operands(batch=3, queries=20, keys=60)
    start = jnp.zeros((3, 20), jnp.int32)
    together = implementation(q, k, v, start, jnp.asarray([0, 7, 40]), scale=SCALE)
    for row, offset in enumerate((0, 7, 40)):
        own = slice(row, row + 1)
        alone = implementation(q[own], k[own], v[own], start[own], jnp.int32(offset), scale=SCALE)
        np.testing.assert_allclose(together[own], alone, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(together[1] - implementation(q, k, v, start, 0, scale=SCALE)[1]).max()) > 1e-2


CASES = {
    "one document": (starts([50]), starts([50])),
    "packed": (starts([9, 30, 11]), starts([1, 1, 48])),
    "a window": (starts([50], window=7), starts([50], window=20)),
    "packed, with windows": (starts([9, 30, 11], window=12), starts([25, 25], window=1)),
    "padding": (starts([20, 30]), starts([49, 1])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_equals_jax_nn(implementation, heads, case):
    q, k, v, dy = operands(heads=heads[0], kv_heads=heads[1])
    start = jnp.asarray(CASES[case])
    index = np.arange(LENGTH)
    mask = ((index >= start[..., None]) & (index <= index[:, None]))[:, None]
    library = with_vjp(jax.nn.dot_product_attention, q, k, v, dy, mask=mask, scale=SCALE, implementation="xla")
    assert_equal(with_vjp(implementation, q, k, v, dy, start, scale=SCALE), library)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_soft_cap(implementation):
    q, k, v, dy = operands(heads=2, kv_heads=2)
    start, place = jnp.asarray(CASES["packed"]), np.arange(LENGTH)
    hidden = ((place < start[..., None]) | (place > place[:, None]))[:, None]

    def by_hand(q, k, v):
        scores = 0.5 * jnp.tanh(jnp.einsum("BTNH,BSNH->BNTS", q, k) * SCALE / 0.5)
        weights = jnp.exp(scores) * ~hidden
        return jnp.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), v)

    actual = with_vjp(implementation, q, k, v, dy, start, scale=SCALE, soft_cap=0.5)
    assert_equal(actual, with_vjp(by_hand, q, k, v, dy))


@pytest.mark.parametrize("offset", [0, 9, 16, 30])
def test_tiles_of_queries_that_continue_a_text(offset):
    q, k, v, dy = operands(queries=20, keys=LENGTH)
    start = jnp.asarray([[0] * 20, [offset // 2] * 20])

    with jax.numpy_dtype_promotion("strict"):
        tiles, whole = (with_vjp(f, q, k, v, dy, start, offset, scale=SCALE) for f in IMPLEMENTATIONS.values())
    assert_equal(tiles, whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_query_without_a_visible_key_gives_zero_and_takes_no_gradient(implementation):
    q, k, v, dy = operands(batch=1)
    start = jnp.arange(LENGTH)[None] + 1
    start = start.at[0, 40:].set(38)
    y, dq, dk, dv = with_vjp(implementation, q, k, v, dy, start, scale=SCALE)
    assert not np.any(y[0, :40]) and not np.any(dq[0, :40]) and np.all(y[0, 40:])
    assert not np.any(dk[0, :38]) and not np.any(dv[0, :38]) and np.isfinite(dk).all()


def test_tiles_that_no_query_sees_are_not_computed():
    q, k, v, dy = operands(batch=1, queries=64)
    start = jnp.asarray(starts([32, 32]))[None]
    v = v.at[:, :16].set(jnp.nan)  # a masked tile would still multiply these by 0
    y, dq, _, _ = with_vjp(chunked.forward, q, k, v, dy, start, scale=SCALE, chunk=16)
    assert np.isfinite(y[:, 32:]).all() and np.isfinite(dq[:, 32:]).all()
    assert np.isnan(y[:, :32]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    q, k, v, dy = operands(head_dim=32, dtype=dtype)
    start = jnp.asarray(CASES["packed"])
    exact = with_vjp(reference.forward, *(x.astype(jnp.float32) for x in (q, k, v, dy)), start, scale=SCALE)

    def error(function):
        results = with_vjp(function, q, k, v, dy, start, scale=SCALE)
        assert all(x.dtype == dtype for x in results)
        return np.asarray([jnp.abs(x - y).mean() for x, y in zip(results, exact, strict=True)])

    tiles, whole = (error(f) for f in IMPLEMENTATIONS.values())
    assert (tiles <= 1.6 * whole).all()  # tiles round the scores' derivative before the last products, as kernels do


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(function, length):
        shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        start = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = with_vjp.lower(function, *[shape] * 4, start, scale=SCALE).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tiles, whole = ([temporaries(f, length) for length in (2048, 4096)] for f in (chunked.forward, reference.forward))
    assert tiles[1] <= 2 * tiles[0]
    assert whole[1] >= 3.9 * whole[0]  # what this guards against
    assert tiles[1] < whole[1] / 40


@pytest.mark.parametrize(
    ("length", "longest", "side"), [(512, 512, 512), (513, 512, 320), (129, 512, 192), (8192, 512, 512), (50, 16, 16)]
)
def test_tiles_pad_little(length, longest, side):
    assert chunked.tile_side(length, longest) == side


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("hopper", {}),
        ("hopper", dict(head_dim=64, dtype="float16")),
        ("chunked", dict(capability=None)),
        ("chunked", dict(capability=89)),
        ("chunked", dict(capability=100)),
        ("chunked", dict(tokamax=False)),
        ("chunked", dict(dtype="float32")),
        ("hopper", dict(head_dim=96)),
        ("chunked", dict(head_dim=100)),
        ("chunked", dict(head_dim=256)),
        ("chunked", dict(queries=2000)),
        ("chunked", dict(self_attention=False)),
        ("reference", dict(queries=128)),
        ("reference", dict(queries=1, capability=None)),
    ],
    ids=str,
)
def test_the_rule(expected, changes):
    usual = dict(queries=2048, head_dim=128, dtype="bfloat16", self_attention=True, capability=90, tokamax=True)
    assert choose(**{**usual, **changes}).implementation == expected


def test_what_was_chosen_runs():
    def loops(queries, **options):
        q, k, v, _ = operands(queries=queries)
        start = jnp.zeros((2, queries), jnp.int32)
        return "while" in str(jax.make_jaxpr(functools.partial(attend, scale=SCALE, **options))(q, k, v, start))

    assert not loops(128) and loops(129)
    assert loops(128, implementation="chunked") and not loops(129, implementation="reference")


def test_an_unknown_implementation_and_hopper_with_a_cache_are_refused():
    q, k, v, _ = operands()
    start = jnp.zeros((2, LENGTH), jnp.int32)
    with pytest.raises(ValueError, match="implementation='flash' must be one of"):
        attend(q, k, v, start, scale=SCALE, implementation="flash")
    with pytest.raises(ValueError, match="'hopper' needs offset=0, got offset=3"):
        attend(q, k, v, start, 3, scale=SCALE, implementation="hopper")


@pytest.mark.parametrize("case", CASES)
def test_tokamax_reads_our_mask_as_we_do(case):
    """By its own plain-JAX form, which defines what its kernels compute."""
    pytest.importorskip("tokamax", reason="tokamax needs Python 3.12")
    from tokamax._src.ops.attention.base import DotProductAttention

    q, k, v, dy = operands()
    start = jnp.asarray(CASES[case])

    def theirs(q, k, v, start):
        options = dict(logits_scale=SCALE, logits_soft_cap=0.5)
        return DotProductAttention()(q, k, v, mask=hopper.mask(start), **options)

    expected = with_vjp(reference.forward, q, k, v, dy, start, scale=SCALE, soft_cap=0.5)
    assert_equal(with_vjp(theirs, q, k, v, dy, start), expected)
