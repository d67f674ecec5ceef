"""Rows of a table, however it is stored, are those of the whole; and no more of it than they is ever dequantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import LoRA
from qlora_jax.models.blocks.embedding import Embedding
from qlora_jax.models.blocks.linear import Linear
from qlora_jax.quant import int8, nf4
from qlora_jax.quant.int8 import Int8Tensor
from qlora_jax.quant.int8.tensor import int8_shapes
from qlora_jax.quant.nf4 import NF4Tensor
from qlora_jax.quant.nf4.tensor import packed_shapes
from qlora_jax.quant.packed import slice_rows, take_rows

# 64 blocks of scales in 16 rows: a group of 256 ends within the table.
TABLE = jax.random.normal(jax.random.key(0), (90, 256), jnp.bfloat16) * 0.02
STORED = {
    "none": TABLE,
    "nf4": nf4.quantize(TABLE),
    "nf4 single": nf4.quantize(TABLE, double=False),
    "int8": int8.quantize(TABLE),
}
stored = pytest.mark.parametrize("weight", STORED.values(), ids=STORED.keys())


def dense(weight):
    if isinstance(weight, NF4Tensor):
        return nf4.dequantize(weight)
    return weight.dequantize() if isinstance(weight, Int8Tensor) else weight


@stored
def test_rows_are_those_of_the_whole(weight):
    index = jnp.array([[0, 89, 63], [64, 63, 7]])
    rows = jax.jit(take_rows)(weight, index)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, dense(weight)[index])
    np.testing.assert_array_equal(Embedding(weight)(index), rows)


@stored
def test_slices_are_those_of_the_whole(weight):
    part = jax.jit(slice_rows, static_argnums=2)(weight, 61, 29)
    assert isinstance(part, type(weight))
    np.testing.assert_array_equal(dense(part), dense(weight)[61:90])


@pytest.mark.parametrize(
    "table", [packed_shapes((8192, 256), "float32", double=True), int8_shapes((8192, 256), "float32")]
)
def test_an_embedding_dequantizes_its_tokens_rows_only(table):
    # What is traced, not what is compiled: XLA may save a model that dequantizes all from itself, or may not.
    traced = str(jax.make_jaxpr(take_rows)(table, jax.ShapeDtypeStruct((1, 8), jnp.int32)))
    assert "f32[8," in traced and "f32[8192," not in traced


def test_rows_that_blocks_cross_are_refused():
    weight = nf4.quantize(jnp.ones((4, 96)))
    with pytest.raises(ValueError, match=r"NF4 needs rows of a multiple of 64 elements, this matrix is \(4, 96\)"):
        take_rows(weight, jnp.arange(2))


@stored
def test_some_outputs_of_a_layer_are_those_of_the_whole(weight):
    layer = Linear(weight, jnp.linspace(-1, 1, 90))
    A, B = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 256), (90, 3)]))
    layer.lora = LoRA(A, B, jnp.float32(0.5))
    x = jax.random.normal(jax.random.key(2), (5, 256), jnp.float32)
    np.testing.assert_allclose(layer.outputs(61, 29)(x), layer(x)[:, 61:], rtol=1e-5, atol=1e-5)


def test_the_int8_product_and_its_derivative_are_those_of_the_dequantized():
    x = jax.random.normal(jax.random.key(1), (5, 256))
    plain, packed = Linear(dense(STORED["int8"])), Linear(STORED["int8"])
    np.testing.assert_array_equal(packed(x), plain(x))
    np.testing.assert_allclose(packed(x[None, :1]), plain(x[None, :1]), rtol=1e-5, atol=1e-6)
    ours, theirs = (jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x) for layer in (packed, plain))  # noqa: B023
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
