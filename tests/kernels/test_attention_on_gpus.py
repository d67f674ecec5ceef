"""Attention compiled for GPUs: for those that are not there, and run on one that is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.device.facts import device_bytes
from qlora_jax.kernels.attention import attend, hopper
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.targets import GPUS
from tests.aot.budgets import ALL

SCALE = 0.1


@functools.partial(jax.jit, static_argnames=("soft_cap", "implementation"))
def train(q, k, v, dy, start, sinks=None, soft_cap=0.0, implementation=None):
    """The output and the gradients of q, k, v and the sinks, if there are any."""
    options = dict(scale=SCALE, soft_cap=soft_cap, implementation=implementation)
    y, vjp = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, start, sinks=sinks, **options), q, k, v, sinks)
    return (y, *(gradient for gradient in vjp(dy) if gradient is not None))


def shapes(length=2048, heads=32, kv_heads=8, head_dim=128, dtype=jnp.bfloat16, sinks=False):
    q, k = (jax.ShapeDtypeStruct((1, length, count, head_dim), dtype) for count in (heads, kv_heads))
    start, scores = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((heads,), dtype)
    return q, k, k, q, start, scores if sinks else None


def compile_or_skip(arguments, gpu):
    try:
        return compile_for(train, arguments, gpu)
    except RuntimeError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))


def test_lowers_for_cuda():
    text = train.trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.while") >= 4


@pytest.mark.parametrize("gpu", ALL)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(heads=8, kv_heads=8, head_dim=64, sinks=True),
        dict(heads=8, kv_heads=2, head_dim=96),
        dict(length=1000),
        dict(heads=8, kv_heads=1, head_dim=256),
        dict(heads=8, kv_heads=1, head_dim=512, sinks=True),
    ],
    ids=str,
)
def test_compiles_for(gpu, shape):
    compiled = compile_or_skip(shapes(**shape), gpu)
    fits = "length" not in shape and shape.get("head_dim", 0) <= hopper.LARGEST_HEAD
    kernel = hopper.installed() and GPUS[gpu].capability == (9, 0) and fits
    assert ("mosaic_gpu" in compiled.as_text()) == kernel


@pytest.mark.parametrize("gpu", ALL)
def test_memory_on_a_gpu_is_linear(gpu):
    few, many = (device_bytes(compile_or_skip(shapes(length), gpu))["temporaries"] for length in (4096, 8192))
    assert many <= 2.1 * few
    assert many < 32 * 8192 * 8192 / 4  # of the scores' matrix not even two bits for each element


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [(128, {}), (128, dict(soft_cap=2.0)), (64, dict(sinks=True)), (64, dict(sinks=True, soft_cap=2.0)), (96, {})],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["chunked", "hopper"])
def test_a_real_gpu_computes_what_the_reference_does(implementation, head_dim, options):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    capability = jax.devices()[0].compute_capability
    if implementation == "hopper" and not (capability == "9.0" and hopper.installed()):
        pytest.skip(f"tokamax's kernels need a Hopper GPU and tokamax {hopper.VERSION}; compute {capability}")
    random = np.random.default_rng(0)
    arrays = shapes(1024, head_dim=head_dim)
    q, k, v, dy = (jnp.asarray(random.standard_normal(a.shape), a.dtype) for a in arrays[:4])
    place = np.arange(1024)
    start = jnp.asarray(np.maximum(np.where(place < 300, 0, 300), place - 400), jnp.int32)[None]
    sinks = jnp.asarray(random.uniform(2, 6, q.shape[2]), jnp.float32) if options.get("sinks") else None
    cap = options.get("soft_cap", 0.0)
    actual, expected = (train(q, k, v, dy, start, sinks, cap, name) for name in (implementation, "reference"))
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)
