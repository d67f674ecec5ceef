"""Compiling for a GPU that is not there: needs the CUDA plugin's wheels and ptxas, but no GPU and no driver."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax.memory.targets import GPUS

FORBID_SPILLS = "xla_gpu_fail_ptx_compilation_on_register_spilling"


class CompilerMissing(RuntimeError):
    """The CUDA plugin's wheels or ptxas are not installed, or cannot be used in this process."""


def compile_for(
    function: jax.stages.Wrapped,
    arguments: Any,
    gpu: str,
    *,
    forbid_spills: bool = False,
    dump_to: Path | None = None,
) -> jax.stages.Compiled:
    """Compiles the jitted `function(*arguments)` for a key of GPUS.

    Args:
      arguments: a tuple of pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.
      forbid_spills: fail where a kernel keeps values in local memory because its registers do not suffice.
      dump_to: a folder for what XLA makes on the way: HLO text, PTX, the memory report.

    Raises:
      CompilerMissing: the CUDA plugin's wheels or ptxas are not installed.
      jax.errors.JaxRuntimeError: the program does not compile for this GPU, or spills where that is forbidden.
    """
    options: dict[str, Any] = {FORBID_SPILLS: True} if forbid_spills else {}
    if dump_to is not None:
        # From jax 0.12 on, PTX is written only where this pattern of stages asks for it.
        options |= {"xla_dump_to": str(dump_to), "xla_dump_emitter_re": "ptx"}
    device = _absent_device(gpu)
    sharding = jax.sharding.SingleDeviceSharding(device)
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    kind = GPUS[gpu].architecture.device_kind
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=kind, num_cores=None, platform="gpu"))
    # Libraries that choose a kernel for the default device must see the one that is compiled for.
    with use_abstract_mesh(mesh), jax.default_device(device):
        lowered = function.lower(*avals)
    with _no_persistent_cache():
        return _compile(lowered, options)


def _absent_device(gpu: str) -> jax.Device:
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}: known are {', '.join(GPUS)}")
    try:
        config = GPUS[gpu].target_config()
        return topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices[0]
    except NotImplementedError as error:  # what JAX raises for a platform that no installed plugin provides
        raise CompilerMissing(
            "compiling for a GPU needs JAX's CUDA plugin: pip install 'qlora-jax[plan]'. Where it is installed, but no "
            "GPU is present, set JAX_PLATFORMS=cpu before Python starts: JAX gives up the plugin otherwise"
        ) from error


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        # The two halves of the nvidia-cuda-nvcc wheel that XLA looks for.
        if "libdevice not found" in str(error) or "ptxas/nvlink" in str(error):
            raise CompilerMissing("compiling for a GPU needs ptxas: pip install 'qlora-jax[plan]'") from error
        raise


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Keeps the program out of JAX's compilation cache: JAX cannot read one for an absent device back."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether the cache is used is looked up once, then remembered
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
