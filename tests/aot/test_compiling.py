"""Compiling for a GPU that is not there, with a kernel of a few lines."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from qlora_jax.device.facts import device_bytes
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.targets import GPUS
from tests.aot import sass
from tests.aot.calls import TRITON, pallas_calls

pytestmark = [
    pytest.mark.usefixtures("cuda_wheels"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
TURNS = 8


def kernel(x_ref, o_ref):
    """Sums TURNS pieces of x."""
    size = o_ref.shape[0]

    def add(i, total):
        return total + jnp.exp(x_ref[pl.ds(i * size, size)])

    o_ref[...] = jax.lax.fori_loop(0, TURNS, add, jnp.zeros(o_ref.shape, jnp.float32))


def spilling_kernel(x_ref, o_ref):
    """Keeps every element of x in registers, for two results of which each needs all."""
    x = x_ref[...]
    o_ref[...] = jnp.cumsum(x * x) / x.sum() + jnp.exp(x)


def program(kernel, inputs: int, outputs: int):
    """A jitted call in one program of one warp, and its arguments."""

    @jax.jit
    @functools.partial(
        pl.pallas_call,
        out_shape=jax.ShapeDtypeStruct((outputs,), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
        name="tiny",
    )
    def call(x_ref, o_ref):
        kernel(x_ref, o_ref)

    return call, (jax.ShapeDtypeStruct((inputs,), jnp.float32),)


WITHOUT_PALLAS = [gpu for gpu in GPUS if GPUS[gpu].capability < (8, 0)]


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu not in WITHOUT_PALLAS])
def test_the_kernel_is_in_the_compiled_program(gpu):
    compiled = compile_for(*program(kernel, TURNS * 128, 128), gpu, forbid_spills=True)
    assert pallas_calls(compiled) == {(TRITON, "tiny")}


@pytest.mark.parametrize("gpu", WITHOUT_PALLAS)
def test_an_older_card_compiles_what_is_no_kernel(gpu):
    square = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
    assert device_bytes(compile_for(jax.jit(lambda x: jnp.sin(x) @ x), (square,), gpu))["arguments"] == 128 * 128 * 2


def test_spills_are_an_error_where_they_are_forbidden():
    spilling = program(spilling_kernel, 4096, 4096)
    compile_for(*spilling, "rtx4090")
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for(*spilling, "rtx4090", forbid_spills=True)


@pytest.mark.skipif(not sass.available(), reason="needs nvdisasm, which there is for CUDA 13 only")
@pytest.mark.parametrize("gpu", ["h200", "rtx3090"])
def test_a_loop_is_found_in_real_machine_code(gpu, tmp_path):
    _, kernels = sass.compile_kernels(*program(kernel, TURNS * 128, 128), gpu, tmp_path)
    tiny = next(kernel for kernel in kernels if kernel.name == "tiny")
    assert len(tiny.loops) == 1
    # Four elements a thread: each turn has at least one exponential for each, in a fraction of all code.
    assert sass.count(tiny.hot, "MUFU") % 4 == 0 and sass.count(tiny.hot, "MUFU") > 0
    assert len(tiny.hot) < len(tiny.code)
    assert tiny.local_memory == tiny.spilled == 0
