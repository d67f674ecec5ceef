"""Compiling for a GPU that is not there: needs the CUDA plugin's wheels, but no GPU and no driver."""

from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qlora_jax.memory.targets import GPUS


def compile_for(function: jax.stages.Wrapped, arguments: Any, gpu: str) -> jax.stages.Compiled:
    """Compiles the jitted `function(*arguments)` for a key of GPUS.

    Args:
      arguments: a tuple of pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.

    Raises:
      RuntimeError: the CUDA plugin's wheels are not installed.
    """
    target = GPUS[gpu]
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target.target_config(), topology="1x1x1")
    except (RuntimeError, NotImplementedError, KeyError) as error:
        raise RuntimeError(f"compiling for {gpu} needs JAX's CUDA plugin: pip install 'qlora-jax[cuda13]'") from error
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    device = AbstractDevice(device_kind=target.name, num_cores=None, platform="gpu")
    # Libraries that choose a kernel for the default device must see the one that is compiled for.
    mesh = AbstractMesh((), (), abstract_device=device)
    with use_abstract_mesh(mesh), jax.default_device(topology.devices[0]):
        return function.lower(*avals).compile()


def device_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on the device while the program runs: arguments, temporaries, outputs, what they share, and the peak."""
    memory: Any = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
    }
    return {**parts, "peak": parts["arguments"] + parts["temporaries"] + parts["outputs"] - parts["aliases"]}
