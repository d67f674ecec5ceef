"""What the GPU offers."""

import jax


def device_memory() -> int | None:
    """Bytes that JAX may use on the GPU; None where there is none."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    return stats.get("bytes_limit") if stats else None
