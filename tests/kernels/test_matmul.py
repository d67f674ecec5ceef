import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.kernels import nf4_matmul
from qlora_jax.quant.nf4 import dequantize, quantize


def operands(n=96, k=128, m=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    weight = quantize(jax.random.normal(keys[0], (n, k)) * 0.1, dtype=jnp.dtype(dtype).name)
    return weight, jax.random.normal(keys[1], (2, m, k), dtype), jax.random.normal(keys[2], (2, m, n), dtype)


@pytest.mark.parametrize(("n", "k"), [(96, 128), (7, 33), (64, 100)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_and_backward_are_those_of_the_dense_weight(n, k, dtype):
    weight, x, dy = operands(n, k, dtype=dtype)
    dense = dequantize(weight)
    y, vjp = jax.vjp(lambda x: nf4_matmul(x, weight), x)
    expected, dense_vjp = jax.vjp(lambda x: jnp.einsum("...K,NK->...N", x, dense), x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(vjp(dy)[0], dense_vjp(dy)[0])


def test_no_dequantized_weight_survives_the_forward_pass():
    """A scan over layers, as the decoder runs: plain autodiff stacks every layer's dequantized weight, this none."""
    size, layers = 512, 6
    stack = jax.vmap(quantize)(jax.random.normal(jax.random.key(0), (layers, size, size)))

    def temporaries(matmul):
        def run(x, stack):
            return jax.lax.scan(lambda x, weight: (jnp.tanh(matmul(x, weight)), None), x, stack)[0].sum()

        compiled = jax.jit(jax.grad(run)).lower(jnp.ones((1, size)), stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense = size * size * 4
    assert temporaries(lambda x, w: x @ dequantize(w).T) >= layers * dense  # what this guards against
    assert temporaries(nf4_matmul) < 2.5 * dense


def test_residuals_are_the_packed_weight():
    weight, x, _ = operands()
    _, vjp = jax.vjp(lambda x: nf4_matmul(x, weight), x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    assert (96, 128) not in shapes and (1, *weight.codes.shape) in shapes


def test_the_weight_takes_no_gradient():
    weight, x, _ = operands()
    gradient = jax.grad(lambda w: nf4_matmul(x, w).sum(), allow_int=True)(weight)
    assert gradient.codes.dtype == jax.dtypes.float0
    assert float(jnp.abs(gradient.nested_absmax).max()) == 0.0


def test_both_passes_dequantize():
    weight, x, _ = operands()
    text = jax.jit(jax.grad(lambda x: jnp.square(nf4_matmul(x, weight)).sum())).lower(x).as_text()
    assert len(re.findall("optimization_barrier", text)) >= 2
