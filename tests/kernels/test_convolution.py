"""The causal depthwise convolution, against one token after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.convolution import causal_convolution, reference


def operands(length, *, width=4, batch=2, dtype=jnp.float32):
    """x, weight, bias and state, of 6 channels."""
    random = np.random.default_rng(0)
    shapes = (batch, length, 6), (6, 1, width), (6,), (batch, width - 1, 6)
    return [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]


def starts(*rows):
    """For each row of documents' lengths, where each token's document begins."""
    return jnp.asarray([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in rows], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(forward, x, weight, bias, state, starts):
    def loss(x, weight, bias, state):
        y, after = forward(x, weight, bias, starts, state)
        return sum(jnp.sum(jnp.sin(z.astype(jnp.float32))) for z in (y, after)), (y, after)

    gradients, results = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, weight, bias, state)
    return *results, *gradients


@pytest.mark.parametrize("rows", [([20], [20]), ([1, 2, 10, 7], [17, 3]), ([1] * 20, [18, 1, 1])], ids=str)
@pytest.mark.parametrize("width", [1, 3, 4])
def test_equals_the_definition(width, rows):
    args = (*operands(20, width=width), starts(*rows))
    with jax.numpy_dtype_promotion("strict"):
        pairs = zip(*(with_gradients(f, *args) for f in (causal_convolution, reference.forward)), strict=True)
    for name, (actual, expected) in zip(("y", "after", "x", "weight", "bias", "state"), pairs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_equals_jax_lax():
    x, weight, bias, _ = operands(20)
    y, _ = causal_convolution(x, weight, bias, starts([20], [20]))
    layout = ("NTC", "OIT", "NTC")
    theirs = jax.lax.conv_general_dilated(x, weight, (1,), [(3, 0)], dimension_numbers=layout, feature_group_count=6)
    np.testing.assert_allclose(y, theirs + bias, rtol=1e-5, atol=1e-6)


def test_a_packed_document_equals_itself_alone():
    x, weight, bias, state = operands(20)
    y, after = causal_convolution(x, weight, bias, starts([2, 11, 7], [5, 13, 2]), state)
    for row, begin, count in ((0, 2, 11), (0, 13, 7), (1, 5, 13), (1, 18, 2)):
        own = slice(row, row + 1), slice(begin, begin + count)
        alone, end = causal_convolution(x[own], weight, bias, starts([count]))
        np.testing.assert_array_equal(y[own], alone)
        if begin + count == 20:
            np.testing.assert_array_equal(after[own[0]], end)


@pytest.mark.parametrize("pieces", [(17, 1, 1, 1), (1, 2, 1, 9, 7), (3, 17)], ids=str)
def test_pieces_equal_the_whole(pieces):
    x, weight, bias, _ = operands(20)
    whole, end = causal_convolution(x, weight, None, starts([20], [20]))
    outputs, begin, state = [], 0, None
    for count in pieces:
        piece = x[:, begin : begin + count]
        y, state = causal_convolution(piece, weight, None, starts([count], [count]), state)
        outputs.append(y)
        begin += count
    np.testing.assert_array_equal(jnp.concatenate(outputs, 1), whole)
    np.testing.assert_array_equal(state, end)


@pytest.mark.parametrize("length", [1, 8])
def test_padding_stays_out_of_the_state(length):
    x, weight, bias, state = operands(length, batch=3)
    counts = jnp.asarray([0, (length + 1) // 2, length])
    padding = jnp.arange(length) >= counts[:, None]
    borders = jnp.where(padding, 99, jnp.zeros((3, length), jnp.int32))
    y, after = causal_convolution(jnp.where(padding[..., None], jnp.nan, x), weight, bias, borders, state, counts)
    np.testing.assert_array_equal(after[0], state[0])
    for row, count in ((1, (length + 1) // 2), (2, length)):
        own = slice(row, row + 1), slice(count)
        alone, end = causal_convolution(x[own], weight, bias, borders[own], state[own[0]])
        np.testing.assert_array_equal(y[own], alone)
        np.testing.assert_array_equal(after[own[0]], end)


def test_half_precision_is_rounded_once():
    x, weight, bias, state = operands(20, dtype=jnp.bfloat16)
    borders = starts([20], [5, 15])
    y, after = causal_convolution(x, weight, bias, borders, state)
    exact, _ = causal_convolution(
        *(a.astype(jnp.float32) for a in (x, weight, bias)), borders, state.astype(jnp.float32)
    )
    assert y.dtype == after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_the_backward_pass_keeps_one_copy_of_the_inputs():
    x, weight, bias, state = operands(200)
    _, backward = jax.vjp(lambda x, weight: causal_convolution(x, weight, bias, starts([200], [200]))[0], x, weight)
    kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert x.size <= kept < 2 * x.size
