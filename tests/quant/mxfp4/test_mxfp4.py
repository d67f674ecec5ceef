"""MXFP4 against transformers' decoding, bit for bit, and against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels.linear import matmul, matmul_transposed
from qlora_jax.quant.formats import FORMATS
from qlora_jax.quant.mxfp4 import MXFP4Tensor, quantize
from qlora_jax.quant.packed import slice_rows, take_rows

DTYPES = ("bfloat16", "float16", "float32")


def every_value(dtype: str, scales=range(256)) -> MXFP4Tensor:
    """A row for each scale; in each row all 256 bytes."""
    count = len(scales)
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (count, 16, 16))
    each = np.broadcast_to(np.asarray(scales, np.uint8)[:, None], (count, 16))
    return MXFP4Tensor.of_blocks(jnp.asarray(blocks), jnp.asarray(each), dtype=dtype)


def bits(values) -> np.ndarray:
    values = np.asarray(values)
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_transformers_to_the_bit(dtype):
    """All scales but 255, the subnormal values of 0 and the infinite ones of 254 included."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    ours = every_value(dtype, range(255))
    blocks, scales = (torch.tensor(np.asarray(a))[None] for a in (ours.blocks, ours.scales))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))[0].T.contiguous()
    integers = {2: torch.int16, 4: torch.int32}[theirs.itemsize]
    expected = theirs.view(integers).numpy().view(bits(np.zeros(0, jnp.dtype(dtype))).dtype)
    np.testing.assert_array_equal(bits(jax.jit(MXFP4Tensor.dequantize)(ours)), expected)


def test_the_smallest_and_the_largest_scale():
    smallest, largest = np.asarray(every_value("float32", [0, 254]).dequantize()).reshape(2, 256, 2)
    np.testing.assert_array_equal(smallest[1], [2.0**-128, 0])  # byte 1: the low half comes first
    np.testing.assert_array_equal(smallest[7 << 4], [0, 6 * 2.0**-127])
    np.testing.assert_array_equal(largest[3 | 4 << 4], [1.5 * 2.0**127, np.inf])
    np.testing.assert_array_equal(largest[11 | 12 << 4], [-1.5 * 2.0**127, -np.inf])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_255_is_no_number(dtype):
    assert bool(jnp.isnan(every_value(dtype, [255]).dequantize()).all())
    assert not bool(jnp.isnan(every_value(dtype, range(255)).dequantize()).any())


@pytest.mark.parametrize("scale", [2, 3, 100, 127, 200, 252])
def test_what_it_holds_comes_back(scale):
    weight = np.asarray(every_value("float32", [scale]).dequantize())
    np.testing.assert_array_equal(bits(quantize(jnp.asarray(weight)).dequantize()), bits(weight))


def test_codes_and_scales_by_the_specification():
    row = np.zeros(32, np.float32)
    # The largest, 7.9, has the exponent 2: scale 1, and it becomes 6. Ties go to the even code.
    row[:10] = [7.9, -0.24, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.1]
    packed = quantize(jnp.asarray(np.stack([row, row * 2.0**-20, np.zeros(32, np.float32)])))
    assert packed.scales[:, 0].tolist() == [127, 107, 0]
    expected = [6, 0, 0, 1, 1, 2, 2, 4, 4, -6]
    np.testing.assert_array_equal(packed.dequantize()[:, :10], np.outer([1, 2.0**-20, 0], expected))
    assert packed.codes[0, :5].tolist() == [0x87, 0x20, 0x42, 0x64, 0xF6]


def test_the_nearest_value_is_chosen():
    weight = jax.random.normal(jax.random.key(0), (16, 64)) * 0.02
    packed = quantize(weight)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = np.repeat(2.0 ** (np.asarray(packed.scales, np.float64) - 127), 32, axis=1)
    largest = np.abs(np.asarray(weight)).reshape(16, -1, 32).max(-1)
    np.testing.assert_array_equal(scale[:, ::32], 2.0 ** (np.floor(np.log2(largest)) - 2))
    nearest = np.abs(np.abs(np.asarray(weight))[..., None] / scale[..., None] - levels).argmin(-1)
    np.testing.assert_array_equal(packed.dequantize(), np.copysign(levels[nearest] * scale, weight))


def test_what_is_infinite_makes_its_block_no_number():
    packed = quantize(jnp.ones((2, 64)).at[1, 40].set(jnp.inf).at[0, 3].set(jnp.nan))
    np.testing.assert_array_equal(packed.scales, [[255, 125], [125, 255]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_registry_says_what_quantizing_gives(dtype):
    form, plain = FORMATS["mxfp4"], jax.ShapeDtypeStruct((3, 6, 96), jnp.dtype(dtype))
    got = jax.eval_shape(jax.vmap(form.quantize), plain)
    want = form.shapes(plain)
    assert jax.tree.structure(got) == jax.tree.structure(want) and want.shape == (6, 96) and want.leading == (3,)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(got)] == [(a.shape, a.dtype) for a in jax.tree.leaves(want)]
    assert want.nbytes == 3 * 6 * (48 + 3) and want.code_bytes == 3 * 6 * 48


def test_rows_and_slices_are_those_of_the_whole():
    table = quantize(jax.random.normal(jax.random.key(0), (20, 64)))
    index = jnp.array([[3, 19], [0, 3]])
    np.testing.assert_array_equal(take_rows(table, index), table.dequantize()[index])
    np.testing.assert_array_equal(slice_rows(table, jnp.int32(5), 7).dequantize(), table.dequantize()[5:12])


def test_the_product_and_its_derivative_keep_the_packed_weight():
    weight = quantize(jax.random.normal(jax.random.key(0), (24, 64)))
    x, dy = (jax.random.normal(jax.random.key(i), (5, size)) for i, size in ((1, 64), (2, 24)))
    for given in (weight, jax.tree.map(lambda a: jnp.stack([a * 0, a]), weight).at_layer(jnp.int32(1))):
        y, pull = jax.vjp(lambda x: matmul(x, given), x)  # noqa: B023
        np.testing.assert_allclose(y, x @ weight.dequantize().T, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(pull(dy)[0], dy @ weight.dequantize(), rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(matmul_transposed(dy, given), pull(dy)[0])
        assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.zeros((2, 16), np.int8), np.zeros((2, 1), np.uint8), r"codes must be uint8 \(2, 16\).*, got int8"),
        (np.zeros((2, 16), np.uint8), np.zeros((2, 2), np.uint8), r"scales must be uint8 \(2, 1\).*, got .* \(2, 2\)"),
        (np.zeros((2, 20), np.uint8), np.zeros((2, 1), np.uint8), r"multiple of 32 elements, this matrix is \(2, 40\)"),
        (np.zeros(16, np.uint8), np.zeros(1, np.uint8), r"codes must be uint8 \[\*L, N, K/2\]"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        MXFP4Tensor.create(codes, scales, dtype="float32")


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(ValueError, match=r"rows of a multiple of 32 elements, this matrix is \(4, 48\): store it as"):
        quantize(jnp.ones((4, 48)))
