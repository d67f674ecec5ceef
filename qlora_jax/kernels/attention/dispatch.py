"""Causal attention over packed documents: the one place where an implementation is chosen."""

import functools
import logging
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.kernels.attention import chunked, hopper, reference
from qlora_jax.kernels.backend import device_capability

log = logging.getLogger("qlora_jax.kernels")

IMPLEMENTATIONS = ("reference", "chunked", "hopper")
# So few rows of scores take no more memory than a tile does: the whole matrix is as good, and one kernel.
FEW_QUERIES = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    start: Int[Array, "B T"],
    offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    *,
    scale: float,
    soft_cap: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scores) · V, where query t of a row sees keys `start[t]` to `offset + t`.

    A range of keys per query says it all: a packed document is one, and a sliding window only moves its start.

    Args:
      q, k, v: one dtype; N is a multiple of K (grouped queries).
      start: int32, the first key that a query sees. Past `offset + t` it sees none, and its output is zero.
      offset: the key that query 0 itself is, of all rows or of each; the number 0 where queries and keys are the same
        tokens.
      scale: factor of q · k.
      soft_cap: scores become `soft_cap · tanh(score / soft_cap)`; 0 for none.
      implementation: one of IMPLEMENTATIONS; by `choose` where None.

    Raises:
      ValueError: an unknown implementation, or "hopper" with an offset.
    """
    same = isinstance(offset, int) and offset == 0 and q.shape[1] == k.shape[1]
    if implementation is None:
        queries, head_dim = q.shape[1], q.shape[3]
        capability, tokamax = device_capability(), hopper.installed()  # the device that tokamax asks, too
        implementation = choose(queries, head_dim, q.dtype.name, same, capability=capability, tokamax=tokamax)
        announce(implementation)
    static: Any = dict(scale=scale, soft_cap=soft_cap)
    if implementation == "reference":
        return reference.forward(q, k, v, start, offset, **static)
    if implementation == "chunked":
        return chunked.forward(q, k, v, start, offset, **static)
    if implementation == "hopper" and same:
        # The device that a function is traced for need not be the one it is compiled for.
        kernel, other = (functools.partial(module.forward, **static) for module in (hopper, chunked))
        return lax.platform_dependent(q, k, v, start, cuda=kernel, default=other)
    raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}, and 'hopper' needs offset=0, got {offset=}")


@functools.cache
def announce(implementation: str) -> None:
    """Writes one line to the log the first time that an implementation for long texts is chosen."""
    words = {"chunked": "tiles of XLA's", "hopper": "tokamax's kernels for Hopper"}
    if implementation in words:
        log.info("Attention runs on %s", words[implementation])


def choose(
    queries: int, head_dim: int, dtype: str, self_attention: bool, *, capability: int | None, tokamax: bool
) -> str:
    """The implementation for a shape and a device; a pure function of its arguments.

    Args:
      self_attention: whether queries and keys are the same tokens.
      capability: ten times the device's CUDA compute capability, None where it has none.
      tokamax: whether it is installed.
    """
    if queries <= FEW_QUERIES:
        return "reference"
    fits = self_attention and queries % hopper.MULTIPLE == 0 and head_dim in hopper.HEAD_SIZES
    if tokamax and capability == hopper.CAPABILITY and fits and dtype in hopper.DTYPES:
        return "hopper"
    return "chunked"
