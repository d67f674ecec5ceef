"""What a GPU's program makes of the optimizer's pages: they stay in host memory, and nothing is copied whole."""

import jax
import jax.numpy as jnp
import optax
import pytest

from qlora_jax.config import OptimSection
from qlora_jax.memory.compile import compile_for
from qlora_jax.training.gradients import Gradients
from qlora_jax.training.offload import init_state, make_page_update
from qlora_jax.training.optimizer import adamw
from tests.training.test_step import make_parts

pytestmark = pytest.mark.usefixtures("cuda_wheels")


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_page_comes_from_host_memory_and_goes_back():
    parts = make_parts(rank=256, layers=16)
    optimizer = adamw(OptimSection(), optax.constant_schedule(1e-3))
    update = make_page_update(optimizer)
    layer = jax.eval_shape(lambda: init_state(optimizer, parts.trained).layers[0])
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    sums = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), parts.trained)
    arguments = (
        parts.trained,
        layer,
        Gradients(sums, scalar, {"grad_norm": scalar}),
        jax.ShapeDtypeStruct((), "int32"),
    )
    memory = compile_for(update, arguments, "rtx4090").memory_analysis()

    moments = 2 * nbytes(parts.trained) // 16
    assert nbytes(layer) == moments + 8  # two counters, which stay on the device
    assert memory.host_argument_size_in_bytes == memory.host_output_size_in_bytes == moments
    assert memory.host_alias_size_in_bytes == moments
    # The adapters are updated in place; a few copies of one page are all that is made on the way.
    assert memory.alias_size_in_bytes == nbytes(parts.trained) + 8
    assert memory.temp_size_in_bytes < 3 * moments < nbytes(parts.trained) / 2
