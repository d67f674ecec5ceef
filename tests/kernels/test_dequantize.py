"""Every implementation of dequantization gives the reference's bits, in Pallas' interpreters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax import kernels
from qlora_jax.kernels.dequantize import reference, triton
from qlora_jax.kernels.tiles import DequantizeTiles
from qlora_jax.quant.nf4 import NF4Layer, NF4Tensor, quantize

DTYPES = ("bfloat16", "float16", "float32")
# A multiple of the tile, ragged against it, an odd N, blocks that cross rows (K no multiple of 64), less than a block.
SHAPES = [(64, 128), (96, 320), (129, 64), (7, 33), (64, 100), (3, 5)]
TRITON = functools.partial(triton.dequantize, tiles=DequantizeTiles(elements=256, warps=4), interpret=True)


def mosaic_interpreted(layer: NF4Layer, dtype):
    from qlora_jax.kernels.dequantize import mosaic

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"the interpreter for Mosaic GPU of jax {jax.__version__} cannot load from global memory")
    return mosaic.dequantize(layer, dtype, interpret=plgpu.InterpretGPUParams())


IMPLEMENTATIONS = {"triton": TRITON, "mosaic": mosaic_interpreted}


def stack(n: int, k: int, *, double: bool = True, dtype: str = "bfloat16", layers: int = 3) -> NF4Tensor:
    weights = jax.random.normal(jax.random.key(n * k), (layers, n, k)) * 0.1
    return jax.vmap(functools.partial(quantize, double=double, dtype=dtype))(weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("double", [True, False])
def test_kernel_gives_the_references_bits(implementation, n, k, double):
    layer = NF4Layer(stack(n, k, double=double), jnp.int32(2))
    weight = jax.jit(lambda layer: IMPLEMENTATIONS[implementation](layer, "bfloat16"))(layer)
    expected = reference.dequantize(layer, "bfloat16")
    assert weight.dtype == jnp.bfloat16 and weight.shape == (n, k)
    np.testing.assert_array_equal(weight.view(jnp.uint16), expected.view(jnp.uint16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_kernel_rounds_to_the_weights_own_dtype_before_the_one_asked_for(implementation, source, target):
    layer = NF4Layer(stack(33, 64, dtype=source), jnp.int32(0))
    weight = jax.jit(lambda layer: IMPLEMENTATIONS[implementation](layer, target))(layer)
    assert weight.dtype == target
    np.testing.assert_array_equal(weight, reference.dequantize(layer, target))


def test_a_layer_is_read_at_a_traced_index():
    whole = stack(16, 64)

    def each(index):
        return TRITON(NF4Layer(whole, index), "float32")

    weights = jax.lax.map(each, jnp.array([2, 0, 1], jnp.int32))
    expected = [kernels.dequantize(whole[i], "float32") for i in (2, 0, 1)]
    np.testing.assert_array_equal(weights, jnp.stack(expected))


def test_a_stack_is_no_single_weight():
    with pytest.raises(
        ValueError, match=r"expected one matrix, got a stack \(3,\) of \(16, 64\): index it, or scan it"
    ):
        kernels.dequantize(stack(16, 64))


def test_a_stack_that_pallas_would_address_wrongly_is_sliced():
    """Between 2**31 and 2**32 bytes Pallas' offsets are 32-bit and signed."""
    from qlora_jax.kernels.operands import operands
    from qlora_jax.quant.nf4.tensor import packed_shapes

    def layers_seen(layers: int) -> int:
        whole = packed_shapes((17920, 6656), "bfloat16", double=True, leading=(layers,))
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(lambda s, i: operands(NF4Layer(s, i)), whole, index).codes.shape[0]

    assert 60 * 17920 * 6656 // 2 in range(2**31, 2**32)
    assert layers_seen(60) == 1
    assert layers_seen(20) == 20 and layers_seen(80) == 80
