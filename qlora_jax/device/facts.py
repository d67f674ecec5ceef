"""Bytes: what the device offers, what it holds, and what programs and arrays take of it."""

import dataclasses
import math
from typing import Any

import jax
import psutil


def device_memory() -> int | None:
    """Bytes that JAX may use on the GPU; None where there is none."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    return stats.get("bytes_limit") if stats else None


def peak_memory() -> int | None:
    """Most bytes that the device's allocator has held in this process; None where it does not say, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def memory_in_use() -> str:
    """What the device's allocator holds; where it does not say, as on a CPU, the resident process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        return f"{stats['bytes_in_use'] / 2**30:.2f} GiB device"
    return f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB process"


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes of device memory while a program runs, by the names of XLA's own `memory_analysis()`."""

    argument_size_in_bytes: int
    temp_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int

    @classmethod
    def of(cls, compiled: Any, resident: int = 0) -> "ProgramMemory":
        """A compiled program's memory, with what lies on the device beside its arguments counted as an argument."""
        stated = compiled.memory_analysis()
        sizes = cls(*(getattr(stated, item.name) for item in dataclasses.fields(cls)))
        return dataclasses.replace(sizes, argument_size_in_bytes=sizes.argument_size_in_bytes + resident)

    @property
    def peak(self) -> int:
        """Arguments, temporaries and outputs; an output in the place of an argument is counted once."""
        together = self.argument_size_in_bytes + self.temp_size_in_bytes + self.output_size_in_bytes
        return together - self.alias_size_in_bytes


def device_bytes(compiled: Any) -> dict[str, int]:
    """Bytes on the device while the program runs: arguments, temporaries, outputs, what they share, and the peak."""
    memory = ProgramMemory.of(compiled)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
        "peak": memory.peak,
    }


def nbytes(leaf: Any) -> int:
    """Bytes of an array or its shape; a key is counted as what it is made of."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or their shapes."""
    return sum(map(nbytes, jax.tree.leaves(tree)))
