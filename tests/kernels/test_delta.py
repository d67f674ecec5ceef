"""The gated delta rule: the form in chunks and the one that is chosen, against one token after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.delta import chunked, dispatch, gated_delta, reference
from qlora_jax.kernels.delta.inverse import unit_inverse

NAMES = ("q", "k", "v", "decay", "beta", "state")
in_chunks = functools.partial(chunked.forward, chunk=8)  # 75 tokens are two groups of five chunks


def operands(length, *, batch=2, key_heads=2, groups=2, seed=0, dtype=jnp.float32):
    """Those of a form, state and all, but for the starts: keys of 8, values of 12."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal((batch, *shape), np.float32)

    q, k = (normal(length, key_heads, 8) for _ in "qk")
    v = normal(length, key_heads, groups, 12)
    decay = -np.exp(normal(length, key_heads, groups))
    beta = 1 / (1 + np.exp(normal(length, key_heads, groups)))
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    return [*arrays, *map(jnp.asarray, (decay, beta, normal(key_heads, groups, 8, 12)))]


def starts(*rows):
    """For each row of documents' lengths, where each token's document begins."""
    return jnp.asarray([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in rows], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(forward, q, k, v, decay, beta, state, starts):
    """The output, the state after it, and the gradients of a sum that no operand is missing from."""

    def loss(*args):
        y, after = forward(*args[:5], starts, args[5])
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.sin(after)), (y, after)

    gradients, results = jax.grad(loss, tuple(range(6)), has_aux=True)(q, k, v, decay, beta, state)
    return results, gradients


def error(actual, expected):
    """The largest difference in units of the largest value; 1 or more where something is no number."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.nan_to_num(abs(actual - expected), nan=np.inf).max() / abs(expected).max()


def assert_alike(actual, expected, *, values=1e-6, gradients=1e-5):
    assert [error(x, y) < values for x, y in zip(actual[0], expected[0], strict=True)] == [True] * 2
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=True):
        assert error(x, y) < gradients, name


CASES = {
    "one document": ([75], [75]),
    "packed": ([7, 30, 1, 37], [16, 59]),
    "borders where chunks and groups end": ([16, 16, 43], [40, 34, 1]),
    "one token each": ([1] * 75, [74, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_tokens(case):
    args = (*operands(75), starts(*CASES[case]))
    with jax.numpy_dtype_promotion("strict"):
        assert_alike(with_gradients(in_chunks, *args), with_gradients(reference.forward, *args))


@pytest.mark.parametrize("heads", [dict(key_heads=1, groups=1), dict(key_heads=1, groups=3)], ids=str)
def test_heads(heads):
    args = (*operands(20, **heads), starts([20], [5, 15]))
    assert_alike(with_gradients(in_chunks, *args), with_gradients(reference.forward, *args))


def test_the_definition_by_hand():
    """Two documents of two tokens, one head, against the formula in float64."""
    q, k, v, decay, beta, state = operands(4, batch=1, key_heads=1, groups=1)
    y, after = reference.forward(q, k, v, decay, beta, starts([2, 2]), state)
    q, k, v, decay, beta, S = (np.asarray(x, np.float64).squeeze() for x in (q, k, v, decay, beta, state))
    for t in range(4):
        key, query = (x[t] / np.sqrt(x[t] @ x[t] + 1e-6) for x in (k, q))
        S = np.zeros_like(S) if t == 2 else np.exp(decay[t]) * S
        S = S + np.outer(key, beta[t] * (v[t] - key @ S))
        np.testing.assert_allclose(y[0, t, 0, 0], query @ S / np.sqrt(8), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after[0, 0, 0], S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [5, 30])
def test_a_packed_document_equals_itself_alone(length):
    q, k, v, decay, beta, _ = merged(operands(8 + length))
    borders = starts([3, length, 5], [1, length + 2, 5])
    y, _ = gated_delta(q, k, v, decay, beta, borders)
    for row, begin, count in ((0, 3, length), (1, 1, length + 2)):
        own = slice(row, row + 1), slice(begin, begin + count)
        alone, _ = gated_delta(*(x[own] for x in (q, k, v, decay, beta)), starts([count]))
        assert error(y[own], alone) < 1e-6


def merged(args):
    """The operands with their value heads on one axis, as `gated_delta` takes them."""
    q, k, v, decay, beta, state = args
    v, decay, beta = (x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (v, decay, beta))
    return q, k, v, decay, beta, state.reshape(state.shape[0], -1, *state.shape[3:])


@pytest.mark.parametrize("pieces", [(20, 1, 1, 1), (1, 9, 13), (8, 8, 7)], ids=str)
def test_pieces_equal_the_whole(pieces):
    *args, state = merged(operands(23))
    whole, end = gated_delta(*args, starts([23], [23]), state)
    outputs, begin = [], 0
    for count in pieces:
        piece = (x[:, begin : begin + count] for x in args)
        y, state = gated_delta(*piece, starts([count], [count]), state)
        outputs.append(y)
        begin += count
    assert error(jnp.concatenate(outputs, 1), whole) < 1e-6
    assert error(state, end) < 1e-6


@pytest.mark.parametrize("length", [8, 30])
def test_padding_leaves_the_state_alone(length):
    q, k, v, decay, beta, state = merged(operands(length, batch=3))
    counts = jnp.asarray([0, 5, length])
    # Padding has a document of its own, and no number in it can be relied on.
    padding = jnp.arange(length) >= counts[:, None]
    borders = jnp.where(padding, 99, starts([length], [2, length - 2], [length]))
    spoilt = [jnp.where(padding.reshape(3, length, *[1] * (x.ndim - 2)), jnp.nan, x) for x in (q, k, v, decay, beta)]
    y, after = jax.jit(gated_delta)(*spoilt, borders, state, counts)
    assert np.array_equal(after[0], state[0])
    for row, count in ((1, 5), (2, length)):
        own = slice(row, row + 1), slice(count)
        expected, end = gated_delta(*(x[own] for x in (q, k, v, decay, beta)), borders[own], state[own[0]])
        assert error(y[own], expected) < 1e-6 and error(after[own[0]], end) < 1e-6


def test_a_later_document_has_nothing_of_the_state():
    *args, state = merged(operands(30))
    borders = starts([10, 20], [29, 1])
    y, after = gated_delta(*args, borders, state)
    other, after_other = gated_delta(*args, borders, 2 * state + 1)
    assert np.array_equal(y[0, 10:], other[0, 10:]) and np.array_equal(after, after_other)
    assert not np.allclose(y[0, :10], other[0, :10])
    assert np.array_equal(gated_delta(*args, borders)[0], gated_delta(*args, borders, 0 * state)[0])


@pytest.mark.parametrize("decay", [-1e-4, -30.0, -1e4])
def test_hard_decays(decay):
    """Also of a mild token after strong ones: its neighbours' sums must not round its own away."""
    args = operands(40)
    strong = args[3].at[:, 1::3].set(decay)
    actual, expected = (
        with_gradients(f, *args[:3], strong, *args[4:], starts([40], [17, 23])) for f in (in_chunks, reference.forward)
    )
    assert_alike(actual, expected)
    assert all(np.isfinite(x).all() for x in actual[1])


def hard_system(noise, beta, decay):
    """The triangular system of 64 tokens whose keys are nearly the same, in float32."""
    random = np.random.default_rng(0)
    keys = random.standard_normal((4, 1, 128)) + noise * random.standard_normal((4, 64, 128))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    left = np.exp(decay * np.subtract.outer(np.arange(64), np.arange(64)).clip(0))
    return np.tril(beta * keys @ keys.mT * left, -1).astype(np.float32)


SYSTEMS = [(1e3, 0.5, -0.1), (1.0, 0.99, -1e-3), (0.3, 0.95, -0.01), (1e-3, 0.999, -1e-4)]


@pytest.mark.parametrize("case", SYSTEMS, ids=str)
def test_the_inverse_is_accurate(case):
    lower = hard_system(*case)
    exact = np.linalg.inv(np.eye(64) + lower.astype(np.float64))
    actual = unit_inverse(jnp.asarray(lower) + np.triu(np.ones((64, 64), np.float32)))
    assert error(actual, exact) < 1e-6
    assert np.array_equal(actual, np.tril(actual))


def test_the_inverse_of_other_sizes_and_its_derivative():
    lower = jnp.asarray(hard_system(1.0, 0.9, -0.01)[:, :24, :24])

    def by_library(x):
        return jnp.linalg.inv(jnp.eye(24) + jnp.tril(x, -1))

    tangent = jnp.asarray(np.random.default_rng(1).standard_normal(lower.shape, np.float32))
    for x, y in zip(*(jax.jvp(f, (lower,), (tangent,)) for f in (unit_inverse, by_library)), strict=True):
        assert error(x, y) < 1e-5
    gradient, expected = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(lower) for f in (unit_inverse, by_library))
    assert error(gradient, expected) < 1e-5


def test_keys_that_are_nearly_the_same():
    """As they are in a text that repeats itself, at the full size of a chunk; both forms against float64."""
    q, k, v, decay, beta, state = operands(128)
    args = q, k[:, :1] + 1e-2 * k, v, 1e-3 * decay, 0.9 + 0.1 * beta, state, starts([128], [50, 78])
    with jax.enable_x64(True):
        exact, _ = exactly(*args)
    for form in (chunked.forward, reference.forward):
        y, _ = form(*args[:5], args[6], state)
        assert error(y, exact) < 1e-5


def exactly(q, k, v, decay, beta, state, starts):
    """`reference.forward` in NumPy's float64."""
    q, k, v, decay, beta, S = (np.asarray(x, np.float64) for x in (q, k, v, decay, beta, state))
    k, q = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6) for x in (k, q))
    y, document = np.zeros_like(v), starts[:, 0]
    for t in range(q.shape[1]):
        same = np.asarray(starts[:, t] == document)[:, None, None]
        S = np.where(same, np.exp(decay[:, t]), 0)[..., None, None] * S
        known = np.einsum("BKGHV,BKH->BKGV", S, k[:, t])
        S = S + np.einsum("BKH,BKGV->BKGHV", k[:, t], beta[:, t, ..., None] * (v[:, t] - known))
        y[:, t] = np.einsum("BKGHV,BKH->BKGV", S, q[:, t]) / np.sqrt(q.shape[-1])
        document = starts[:, t]
    return y, S


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", [in_chunks, reference.forward], ids=["chunks", "tokens"])
def test_half_precision_is_rounded_at_the_end_alone(form, dtype):
    args = (*operands(40, dtype=dtype), starts([40], [17, 23]))
    (y, after), gradients = with_gradients(form, *args)
    assert (y.dtype, after.dtype) == (dtype, jnp.float32)
    assert [x.dtype for x in gradients] == [dtype] * 3 + [jnp.float32] * 3
    wide = [x.astype(jnp.float32) if x.dtype == dtype else x for x in args]
    exact, state = reference.forward(*wide[:5], wide[6], wide[5])
    assert error(y, exact.astype(dtype)) < 2 * jnp.finfo(dtype).eps and error(after, state) < 1e-6


def test_few_tokens_take_the_form_by_tokens(monkeypatch):
    class Ran(Exception):
        pass

    def ran(*_):
        raise Ran

    monkeypatch.setattr(chunked, "forward", ran)
    for length in (1, dispatch.FEW_TOKENS):
        *args, _ = merged(operands(length))
        gated_delta(*args, starts([length], [length]))
    *args, _ = merged(operands(length + 1))
    with pytest.raises(Ran):
        gated_delta(*args, starts([length + 1], [length + 1]))


def test_heads_that_do_not_divide_are_refused():
    q, k, v, decay, beta, _ = merged(operands(4))
    with pytest.raises(ValueError, match="3 value heads of v must be a multiple of 2 key heads"):
        gated_delta(q, k, v[:, :, :3], decay[:, :, :3], beta[:, :, :3], starts([4], [4]))
