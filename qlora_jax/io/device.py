"""What the GPU offers, and what arrays take of it."""

import math
from typing import Any

import jax


def device_memory() -> int | None:
    """Bytes that JAX may use on the GPU; None where there is none."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    return stats.get("bytes_limit") if stats else None


def nbytes(leaf: Any) -> int:
    """Bytes of an array or its shape; a key is counted as what it is made of."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or their shapes."""
    return sum(map(nbytes, jax.tree.leaves(tree)))
