"""Device time of jitted functions: the median of many readings, with operands that no cache holds."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.gpu.sizes import Sizes

# JAX queues 32 programs and then waits: with more in one reading, queueing would look as slow as the device.
MOST_QUEUED = 32
# Results of queued programs may take this much memory: they are freed only as the device gets there.
MOST_BYTES = 8_000_000_000
# Above this share of the time spent in queueing, the host is what was measured.
HOST_BOUND = 0.9


class Timing(NamedTuple):
    """Seconds of one call: the median, the spread of the middle half as a share of it, and the host's share."""

    seconds: float
    spread: float
    host: float

    @property
    def note(self) -> str | None:
        """What has to be known beside the figure."""
        if self.host > HOST_BOUND:
            return f"host-bound: {self.host:.0%} of the time went into queueing"
        return f"spread {self.spread:.0%}" if self.spread > 0.05 else None


def flat(function: Callable, example: Sequence[Any]) -> Callable:
    """`function` jitted over the leaves of its arguments: JAX queues plain arrays faster than nested classes."""
    tree = jax.tree.structure(tuple(example))
    return jax.jit(lambda *leaves: function(*tree.unflatten(leaves)))


def measure(function: Callable, sets: Sequence[Sequence[Any]], sizes: Sizes) -> Timing:
    """Times `function(*arguments)` with the `sets` of arguments in turn."""
    quick = flat(function, sets[0])
    leaves = [jax.tree.leaves(tuple(arguments)) for arguments in sets]
    results = jax.tree.leaves(jax.eval_shape(quick, *leaves[0]))
    calls = min(sizes.calls, max(2, MOST_BYTES // sum(math.prod(a.shape) * a.dtype.itemsize for a in results)))
    return timed(quick, leaves, calls, sizes.rounds)


def timed(function: Callable, sets: Sequence[Sequence[Any]], calls: int, rounds: int) -> Timing:
    """`rounds` readings of `calls` queued calls each, after every set has been through twice."""
    calls = min(calls, MOST_QUEUED - 8)
    for arguments in [*sets, *sets]:
        jax.block_until_ready(function(*arguments))
    readings, host = [], []
    for index in range(rounds):
        chosen = [sets[(index * calls + i) % len(sets)] for i in range(calls)]
        began = time.perf_counter()
        for arguments in chosen:
            result = function(*arguments)
        queued = time.perf_counter()
        jax.block_until_ready(result)
        ended = time.perf_counter()
        readings.append((ended - began) / calls)
        host.append((queued - began) / (ended - began))
    return Timing(statistics.median(readings), spread(readings), statistics.median(host))


def spread(readings: Sequence[float]) -> float:
    """Distance between the quartiles, as a share of the median."""
    if len(readings) < 4:
        return (max(readings) - min(readings)) / statistics.median(readings)
    low, middle, high = statistics.quantiles(readings, n=4)
    return (high - low) / middle


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time of calls that wait for their own result."""
    readings = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        readings.append(time.perf_counter() - began)
    return statistics.median(readings)


def peak_bytes() -> int | None:
    """The most that the allocator ever held at once in this process; None where the backend does not count."""
    return memory_stat("peak_bytes_in_use")


def memory_stat(name: str) -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get(name)
