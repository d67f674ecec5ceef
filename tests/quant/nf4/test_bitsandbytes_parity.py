"""Our NF4 against the real bitsandbytes, on drawn shapes, dtypes and values."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.quant.nf4 import NF4Tensor, dequantize, dynamic_map, quantize

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = ("float32", "bfloat16", "float16")
# Odd sizes, rows that share bytes and blocks, partial last blocks, one element, several nested groups.
SHAPES = st.sampled_from([(1, 1), (3, 5), (7, 64), (5, 100), (33, 65), (64, 192), (2, 63), (128, 256), (300, 320)])


@st.composite
def weights(draw):
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(shape).astype(np.float32) * draw(st.sampled_from([1e-3, 0.02, 1.0, 100.0]))
    if draw(st.booleans()):
        values.reshape(-1)[: 64 * draw(st.integers(1, 3))] = 0
    return values, dtype


def both(values, dtype, double):
    theirs = torch.tensor(values).to(getattr(torch, dtype))
    ours = jnp.asarray(theirs.float().numpy()).astype(dtype)
    return quantize(ours, double=double), bnb.quantize_4bit(theirs, quant_type="nf4", compress_statistics=double)


def flat(array):
    return np.asarray(array).reshape(-1)


def test_dynamic_map_is_bitsandbytes_own():
    digest = hashlib.sha256(dynamic_map().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@settings(max_examples=60, deadline=None)
@given(weights())
def test_codes_and_scales_are_bit_exact(drawn):
    values, dtype = drawn
    ours, (codes, state) = both(values, dtype, double=False)
    np.testing.assert_array_equal(flat(ours.codes), flat(codes))
    np.testing.assert_array_equal(flat(ours.absmax), flat(state.absmax))
    assert ours.dtype == dtype and ours.shape == values.shape


@settings(max_examples=40, deadline=None)
@given(weights())
def test_their_bytes_dequantize_bit_exactly(drawn):
    values, dtype = drawn
    ours, (codes, state) = both(values, dtype, double=True)
    theirs = NF4Tensor.create(
        jnp.asarray(codes.numpy()).reshape(ours.codes.shape),
        jnp.asarray(state.absmax.numpy()).reshape(ours.absmax.shape),
        jnp.asarray(state.state2.absmax.numpy()),
        jnp.asarray(state.state2.code.numpy()),
        jnp.asarray(state.offset.numpy()),
        shape=values.shape,
        dtype=dtype,
    )
    expected = bnb.dequantize_4bit(codes, state).float().numpy().reshape(values.shape)
    for run in (dequantize, jax.jit(dequantize)):
        np.testing.assert_array_equal(np.asarray(run(theirs)).astype(np.float32), expected)


def test_double_quantization_is_within_an_ulp_or_an_adjacent_code():
    entries = different = 0
    for seed, dtype in enumerate(DTYPES * 4):
        values = np.random.default_rng(seed).standard_normal((128, 2048)).astype(np.float32) * 0.02
        ours, (codes, state) = both(values, dtype, double=True)
        np.testing.assert_array_equal(flat(ours.codes), flat(codes))
        ulp = np.spacing(np.float32(state.offset))
        assert abs(float(ours.offset) - float(state.offset)) <= 2 * ulp
        difference = np.abs(flat(ours.absmax).astype(int) - flat(state.absmax).astype(int))
        assert difference.max() <= 1
        entries, different = entries + difference.size, different + int((difference > 0).sum())
        np.testing.assert_allclose(flat(ours.nested_absmax), flat(state.state2.absmax), rtol=1e-6)
    assert different / entries <= 1e-4  # what remains comes from an offset that differs in its last bit


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double):
    weight = dequantize(quantize(jnp.zeros((3, 100)), double=double))
    np.testing.assert_array_equal(np.asarray(weight), 0)
