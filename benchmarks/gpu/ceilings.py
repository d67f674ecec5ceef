"""What this card can do at best, measured in the same run: copying, reading, and bfloat16 matrix products."""

import jax
import jax.numpy as jnp

from benchmarks.gpu.context import GB, Context
from benchmarks.gpu.names import COPY, PEAK, READ
from benchmarks.gpu.timing import measure


def copy_bandwidth(context: Context) -> None:
    """Bytes read plus bytes written per second; the better of a device copy and an elementwise kernel."""
    words = context.sizes.copy_bytes // 4
    x = jax.random.bits(jax.random.key(0), (words,), jnp.uint32)
    found = [measure(f, [(x,)], context.sizes) for f in (jnp.copy, lambda x: x ^ jnp.uint32(1))]
    best = min(found, key=lambda timing: timing.seconds)
    context.row(COPY, 2 * x.nbytes / best.seconds / GB, "GB/s", note=best.note)


def read_bandwidth(context: Context) -> None:
    """Bytes per second of a sum over an array."""
    x = jax.random.normal(jax.random.key(1), (context.sizes.copy_bytes // 4 // 1024, 1024), jnp.float32)
    timing = measure(lambda x: x.sum(-1), [(x,)], context.sizes)
    context.row(READ, x.nbytes / timing.seconds / GB, "GB/s", note=timing.note)


def matmul_peak(context: Context) -> None:
    """The best of some large products of random matrices, in TFLOP/s."""
    found = {}
    for m, n, k in context.sizes.gemms:
        keys = jax.random.split(jax.random.key(2), 5)
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        sets = [(x, jax.random.normal(key, (n, k), jnp.bfloat16)) for key in keys[1:]]
        timing = measure(lambda x, w: x @ w.T, sets, context.sizes)
        found[f"{m}x{n}x{k}"] = 2 * m * n * k / timing.seconds / 1e12
    best = max(found, key=lambda name: found[name])
    context.row(PEAK, found[best], "TFLOP/s", note=", ".join(f"{name}: {rate:.4g}" for name, rate in found.items()))


def run(context: Context) -> None:
    copy_bandwidth(context)
    read_bandwidth(context)
    matmul_peak(context)
