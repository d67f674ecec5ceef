import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant.int8 import Int8Tensor, quantize
from qlora_jax.quant.int8.tensor import int8_shapes


def test_codes_and_scales_are_the_rows_own():
    weight = jnp.array([[1.0, -2.54, 0.01, 0.03], [0.0, 0.0, 0.0, 0.0], [127.0, 0.5, 1.5, -126.6]])
    packed = quantize(weight)
    assert packed.codes.tolist() == [[50, -127, 0, 2], [0, 0, 0, 0], [127, 0, 2, -127]]  # a tie goes to the even code
    np.testing.assert_allclose(packed.scale, [0.02, 0.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(packed.dequantize()[2], [127.0, 0.0, 2.0, -127.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_is_at_most_half_a_step(dtype):
    weight = jax.random.normal(jax.random.key(0), (32, 96), dtype) * 0.02
    packed = quantize(weight)
    assert packed.dequantize().dtype == dtype and packed.dtype == dtype
    half_step = 0.5 * packed.scale[:, None] * 1.001
    rounding = 2.0**-8 * jnp.abs(weight.astype(jnp.float32)) if dtype != "float32" else 0
    error = jnp.abs(packed.dequantize(jnp.float32) - weight.astype(jnp.float32))
    assert bool((error <= half_step + rounding).all())


def test_subnormal_rows_become_zero_without_nan():
    packed = quantize(jnp.full((1, 4), 1e-39, jnp.float32))
    np.testing.assert_array_equal(packed.dequantize(), np.zeros((1, 4)))


def test_shapes_are_those_of_quantizing():
    got = jax.eval_shape(quantize, jax.ShapeDtypeStruct((6, 5), jnp.bfloat16))
    want = int8_shapes((6, 5), "bfloat16")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert want.nbytes == 6 * 5 + 6 * 4 and want.shape == (6, 5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (jnp.zeros((2, 3, 4)), r"one non-empty matrix \[N, K\], got shape \(2, 3, 4\)"),
        (jnp.zeros((0, 4)), "non-empty matrix"),
        (jnp.zeros((2, 4), jnp.int32), "takes bfloat16, float16, float32, got int32"),
    ],
)
def test_what_cannot_be_quantized(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight)


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        (np.zeros((2, 4), np.uint8), np.zeros(2, np.float32), r"codes must be int8 \(2, 4\) .*, got uint8"),
        (np.zeros((2, 4), np.int8), np.zeros(4, np.float32), r"scale must be float32 \(2,\) .*, got float32 \(4,\)"),
    ],
)
def test_arrays_that_do_not_fit(codes, scale, message):
    with pytest.raises(ValueError, match=message):
        Int8Tensor.create(codes, scale, dtype="float32")
