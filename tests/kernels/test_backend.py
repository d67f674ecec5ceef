"""Which kernels are chosen, how that is said, and that the choice reaches the compiled code."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax import kernels
from qlora_jax.kernels import backend
from qlora_jax.kernels.backend import Choice, choose
from qlora_jax.kernels.tiles import TILES, tiles_for
from qlora_jax.quant.nf4 import NF4Layer
from qlora_jax.quant.nf4.tensor import packed_shapes


def abstract_gpu(kind: str):
    return use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=kind, num_cores=None, platform="gpu"))
    )


@pytest.mark.parametrize(
    ("request_", "capability", "name"),
    [
        ("auto", 90, "triton"),
        ("auto", 80, "triton"),
        ("auto", 75, "xla"),
        ("auto", None, "xla"),
        ("pallas", 86, "triton"),
        ("mosaic", 90, "mosaic"),
        ("xla", 90, "xla"),
    ],
)
def test_choice(request_, capability, name):
    assert choose(request_, capability, "bfloat16", has_triton=True).name == name


@pytest.mark.parametrize(
    ("capability", "dtype", "has_triton", "words"),
    [
        (75, "bfloat16", True, r"compute capability 7.5 is below 8.0 \(NVIDIA Ampere\)"),
        (None, "bfloat16", True, "JAX runs on cpu, not on an NVIDIA GPU"),
        (90, "bfloat16", False, rf"jax {jax.__version__} has no Pallas Triton backend"),
        (90, "float64", True, "there is no kernel for float64, only for bfloat16, float16, float32"),
    ],
)
def test_an_obstacle_is_the_reason_of_auto_and_the_error_of_a_name(capability, dtype, has_triton, words):
    choice = choose("auto", capability, dtype, has_triton=has_triton)
    assert choice.name == "xla"
    with pytest.raises(RuntimeError, match=rf"kernels='pallas' cannot run: {words}.* Use kernels='auto' or 'xla'"):
        choose("pallas", capability, dtype, has_triton=has_triton)


def test_mosaic_needs_hopper():
    with pytest.raises(RuntimeError, match=r"compute capability 8.9 is below 9.0 \(NVIDIA Hopper\)"):
        choose("mosaic", 89, "bfloat16", has_triton=True)


def test_mosaic_needs_no_triton():
    assert choose("mosaic", 90, "bfloat16", has_triton=False).name == "mosaic"


def test_a_gpu_without_the_plugin_is_mentioned(monkeypatch):
    monkeypatch.setattr(backend.Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    reason = choose("auto", None, "bfloat16", has_triton=True).reason
    assert (
        "there is one, but JAX's CUDA plugin is not installed or not selected: pip install 'qlora-jax[cuda13]'"
        in reason
    )


def test_the_environment_is_a_wish_and_using_goes_over_it(monkeypatch):
    monkeypatch.setenv("QLORA_JAX_KERNELS", "mosaic")
    assert backend.requested() == "mosaic"
    with kernels.using("auto"):
        assert backend.requested() == "mosaic"
    with kernels.using("xla"):
        assert backend.requested() == "xla"
    monkeypatch.setenv("QLORA_JAX_KERNELS", "cuda")
    with pytest.raises(ValueError, match="QLORA_JAX_KERNELS='cuda': expected auto, pallas, mosaic, xla"):
        backend.requested()


def test_a_name_nobody_knows():
    with (
        pytest.raises(ValueError, match="kernels='triton': expected auto, pallas, mosaic, xla"),
        kernels.using("triton"),
    ):
        pass


def test_a_choice_is_logged_once(caplog):
    backend.announce.cache_clear()
    choice = Choice("triton", 90, "compute capability 90")
    with caplog.at_level(logging.INFO, "qlora_jax.kernels"):
        backend.announce(choice)
        backend.announce(choice)
    assert caplog.messages == ["NF4 runs on Pallas kernels (Triton): compute capability 90"]


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H200", 90),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A10", 86),
        ("NVIDIA GeForce RTX 4090", 89),
        ("Tesla T4", 75),
        ("NVIDIA B200", 100),
        ("NVIDIA Something", None),
    ],
)
def test_capability_of_a_device_that_is_compiled_for(kind, capability):
    with abstract_gpu(kind):
        assert backend.capability() == capability


def test_capability_without_a_gpu():
    assert backend.capability() is None


def test_tiles_of_a_newer_architecture_are_those_of_the_newest_known():
    assert tiles_for(100) == TILES[90]
    assert tiles_for(86) == TILES[86]


def lowered(tokens: int, request_: str, kind: str = "NVIDIA H200") -> str:
    weight = packed_shapes((256, 256), "bfloat16", double=True, leading=(2,))
    x = jax.ShapeDtypeStruct((tokens, 256), jnp.bfloat16)

    def loss(x, stack):
        return kernels.nf4_matmul(x, NF4Layer(stack, jnp.int32(1))).astype(jnp.float32).sum()

    with abstract_gpu(kind), kernels.using(request_):
        traced = jax.jit(jax.value_and_grad(loss)).trace(x, weight)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_lowering_for_cuda():
    """Few rows of x are multiplied in one kernel and the derivative dequantizes; many dequantize in both passes."""
    few, many = lowered(4, "auto"), lowered(1024, "auto")
    assert few.count('name = "nf4_matmul"') == 1 and few.count('name = "nf4_dequantize"') == 1
    assert many.count('name = "nf4_matmul"') == 0 and many.count('name = "nf4_dequantize"') == 2
    assert "nf4_" not in lowered(4, "xla") and "nf4_" not in lowered(4, "auto", "Tesla T4")


def test_the_choice_is_part_of_what_jit_remembers():
    @jax.jit
    def double(x):
        seen.append(backend.requested())
        return 2 * x

    seen: list[str] = []
    for request_ in ("auto", "xla", "auto"):
        with kernels.using(request_):
            double(1.0)
    assert seen == ["auto", "xla"]
