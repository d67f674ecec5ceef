"""Causal attention over packed documents: the one place where an implementation is chosen."""

import functools
import logging
from typing import Any, NamedTuple

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
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scores) · V, where query t of a row sees keys `start[t]` to `offset + t`.

    A range of keys per query says it all: a packed document is one, and a sliding window only moves its start. So does
    a chunked window, whose queries see keys from the start of their chunk.

    Args:
      q, k, v: one dtype; N is a multiple of K (grouped queries).
      start: int32, the first key that a query sees. Past `offset + t` it sees none, and its output is zero.
      offset: the key that query 0 itself is, of all rows or of each; the number 0 where queries and keys are the same
        tokens.
      scale: factor of q · k.
      soft_cap: scores become `soft_cap · tanh(score / soft_cap)`; 0 for none.
      sinks: for each head the score of one more key, which every query sees and whose value is zero. A query that sees
        no other key still gives zero.
      implementation: one of IMPLEMENTATIONS; by `choose` where None.

    Raises:
      ValueError: an unknown implementation, or "hopper" with an offset.
    """
    same = isinstance(offset, int) and offset == 0 and q.shape[1] == k.shape[1]
    if implementation is None:
        queries, head_dim = q.shape[1], q.shape[3]
        capability, tokamax = device_capability(), hopper.installed()  # the device that tokamax asks, too
        choice = choose(queries, head_dim, q.dtype.name, same, capability=capability, tokamax=tokamax)
        announce(choice)
        implementation = choice.implementation
    static: Any = dict(scale=scale, soft_cap=soft_cap)
    if implementation == "reference":
        return reference.forward(q, k, v, start, offset, sinks=sinks, **static)
    if implementation == "chunked":
        return chunked.forward(q, k, v, start, offset, sinks=sinks, **static)
    if implementation == "hopper" and same:
        # The device that a function is traced for need not be the one it is compiled for.

        def run(forward):
            return lambda q, k, v, start, sinks: forward(q, k, v, start, sinks=sinks, **static)

        return lax.platform_dependent(q, k, v, start, sinks, cuda=run(hopper.forward), default=run(chunked.forward))
    raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}, and 'hopper' needs offset=0, got {offset=}")


class Choice(NamedTuple):
    """An implementation, and why it is not this device's kernel: empty where it is, or there is none."""

    implementation: str
    reason: str = ""


@functools.cache
def announce(choice: Choice) -> None:
    """Writes one line to the log the first time that an implementation for long texts is chosen for a reason."""
    words = {"chunked": "tiles of XLA's", "hopper": "tokamax's kernels for Hopper"}
    if choice.implementation in words:
        reason = f": {choice.reason}" if choice.reason else ""
        log.info("Attention runs on %s%s", words[choice.implementation], reason)


def choose(
    queries: int, head_dim: int, dtype: str, self_attention: bool, *, capability: int | None, tokamax: bool
) -> Choice:
    """The implementation for a shape and a device; a pure function of its arguments.

    Args:
      self_attention: whether queries and keys are the same tokens.
      capability: ten times the device's CUDA compute capability, None where it has none.
      tokamax: whether it is installed.
    """
    if queries <= FEW_QUERIES:
        return Choice("reference")
    if not (tokamax and capability == hopper.CAPABILITY):
        return Choice("chunked")
    reason = hopper.obstacle(queries, head_dim, dtype, self_attention)
    return Choice("chunked", reason) if reason else Choice("hopper")
