"""The memory of the gated delta rule's backward pass grows with the length, and not with its square."""

import jax
import jax.numpy as jnp

from qlora_jax.kernels.delta import gated_delta
from qlora_jax.kernels.delta.chunked import CHUNK, GROUP


def shapes(length):
    """4 key heads and 8 value heads of 64."""
    few, many = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16) for heads in (4, 8))
    scalars = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
    return few, few, many, scalars, scalars, jax.ShapeDtypeStruct((1, length), jnp.int32)


@jax.jit
def train(q, k, v, decay, beta, starts, dy):
    """The output and the gradients of all operands."""
    y, vjp = jax.vjp(lambda *args: gated_delta(*args, starts)[0], q, k, v, decay, beta)
    return y, vjp(dy)


def test_temporaries_grow_with_the_length():
    def temporaries(length):
        arguments = shapes(length)
        return train.lower(*arguments, arguments[2]).compile().memory_analysis().temp_size_in_bytes

    few, more, many = map(temporaries, (1024, 4096, 7168))
    print(few, more, many)
    assert many - more <= 1.1 * (more - few)
    assert more < 8 * 4096 * 4096  # of a matrix of pairs not even a byte for each element


def test_the_backward_pass_keeps_the_operands_and_a_state_for_each_group():
    def forward(q, k, v, decay, beta, starts):
        return jax.vjp(lambda *args: gated_delta(*args, starts)[0], q, k, v, decay, beta)[1]

    def size(shapes):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    arguments = shapes(4096)
    states = 4096 // (CHUNK * GROUP) * 8 * 64 * 64 * 4
    assert 1 <= size(jax.eval_shape(forward, *arguments)) / (size(arguments) + states) < 1.02


def test_on_a_gpu_it_is_matrix_products_in_full_float32_and_no_library_is_called():
    arguments = shapes(1024)
    text = train.trace(*arguments, arguments[2]).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
    assert "custom_call" not in text and "triangular_solve" not in text
