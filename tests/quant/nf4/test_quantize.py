import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant.nf4 import NF4Tensor, dequantize, quantize
from qlora_jax.quant.nf4.tensor import packed_shapes


def normal(shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype) * 0.02


def test_seven_billion_parameters_take_4_127_bits_each():
    packed = packed_shapes((4096, 4096), "bfloat16", double=True)
    per_parameter = 8 * (packed.nbytes - packed.nested_levels.size * 4) / 4096**2
    assert per_parameter == pytest.approx(4.127, abs=5e-4)


def test_quantizing_needs_little_temporary_memory():
    weight = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    memory = jax.jit(quantize).lower(weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 1.5 * 2048 * 2048 * 4


@pytest.mark.parametrize("shape", [(8, 128), (5, 33)])
def test_a_stack_equals_its_layers(shape):
    weights = normal((3, *shape))
    stack = jax.vmap(lambda w: quantize(w))(weights)
    assert stack.leading == (3,) and stack.shape == shape
    assert dequantize(stack).shape == (3, *shape)
    for layer in range(3):
        np.testing.assert_array_equal(dequantize(stack[layer]), dequantize(quantize(weights[layer])))
        np.testing.assert_array_equal(dequantize(stack)[layer], dequantize(stack[layer]))


def test_dequantized_values_are_rounded_to_the_weights_own_dtype_first():
    weight = normal((4, 64))
    packed = quantize(weight, dtype="bfloat16")
    wide = dequantize(packed, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, wide.astype(jnp.bfloat16).astype(jnp.float32))


def test_error_is_that_of_nf4():
    weight = normal((256, 256))
    error = dequantize(quantize(weight)) - weight
    # Root mean square error on normal weights, relative to their deviation, as bitsandbytes gives it too.
    assert float(jnp.std(error) / jnp.std(weight)) == pytest.approx(0.0917, abs=0.001)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (jnp.zeros((2, 3, 4)), r"one non-empty matrix \[N, K\], got shape \(2, 3, 4\)"),
        (jnp.zeros((0, 4)), r"non-empty matrix"),
        (jnp.zeros((2, 4), jnp.int32), "takes bfloat16, float16, float32, got int32"),
    ],
)
def test_what_cannot_be_quantized(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight)


def test_create_checks_shapes_and_dtypes():
    packed = quantize(normal((8, 128)))
    with pytest.raises(
        ValueError,
        match=r"NF4Tensor.codes must be uint8 \(8, 64\) for a weight of \(8, 128\), got uint8 \(4, 64\)",
    ):
        NF4Tensor.create(
            packed.codes[:4],
            packed.absmax,
            packed.nested_absmax,
            packed.nested_levels,
            packed.offset,
            shape=(8, 128),
            dtype="float32",
        )
    with pytest.raises(ValueError, match="NF4Tensor.offset is absent: the nested fields go together"):
        NF4Tensor.create(
            packed.codes,
            packed.absmax,
            packed.nested_absmax,
            packed.nested_levels,
            shape=(8, 128),
            dtype="float32",
        )


def test_a_single_matrix_has_no_layers_to_index():
    with pytest.raises(IndexError, match="single matrix"):
        quantize(normal((8, 128)))[0]
