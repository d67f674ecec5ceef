"""What `compile_for` says where it cannot compile. What it compiles is tested in tests/aot."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.memory import compile as compiling
from qlora_jax.memory.compile import CompilerMissing, compile_for

PROGRAM = jax.jit(jnp.sin), (jax.ShapeDtypeStruct((8,), jnp.float32),)


@pytest.fixture
def cpu_for_gpu(monkeypatch):
    """Lets the CPU stand in for the absent card, so that everything but XLA's compiler runs."""
    monkeypatch.setattr(compiling, "_absent_device", lambda gpu: jax.devices("cpu")[0])


def compile_error(monkeypatch, message):
    def fail(lowered, **options):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match="unknown GPU 'rtx9999': known are rtx3060, rtx3090, rtx4070, "):
        compile_for(*PROGRAM, "rtx9999")


def test_a_missing_plugin_is_named_with_the_next_step(monkeypatch):
    def unknown_platform(**arguments):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(compiling.topologies, "get_topology_desc", unknown_platform)
    with pytest.raises(CompilerMissing, match=r"needs JAX's CUDA plugin: pip install 'qlora-jax\[plan\]'"):
        compile_for(*PROGRAM, "h200")


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: libdevice not found at ./libdevice.10.bc",
        "No PTX compilation provider is available. Neither ptxas/nvlink nor nvjtlink is available.",
    ],
)
def test_a_missing_assembler_is_named_with_the_next_step(cpu_for_gpu, monkeypatch, message):
    compile_error(monkeypatch, message)
    with pytest.raises(CompilerMissing, match=r"needs ptxas: pip install 'qlora-jax\[plan\]'"):
        compile_for(*PROGRAM, "h200")


@pytest.mark.parametrize("message", ["CANCELLED: discarded due to register spilling", "INTERNAL: a bug"])
def test_what_does_not_compile_is_reported_as_it_is(cpu_for_gpu, monkeypatch, message):
    compile_error(monkeypatch, message)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        compile_for(*PROGRAM, "h200")


def test_nothing_is_left_in_the_compilation_cache(cpu_for_gpu, tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    compiling.compilation_cache.reset_cache()
    try:
        for name, value in zip(names, (str(tmp_path), 0, 0), strict=True):
            jax.config.update(name, value)
        compile_for(*PROGRAM, "h200")
        assert list(tmp_path.iterdir()) == []
        PROGRAM[0].lower(*PROGRAM[1]).compile()  # the cache is on again afterwards
        assert list(tmp_path.iterdir()) != []
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compiling.compilation_cache.reset_cache()
