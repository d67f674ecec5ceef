"""Starting values of A and B."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.lora.targets import Target


def key_for(key: Array, name: str) -> Array:
    """A key that depends on the module's name alone, so that another target more or less moves no one else's values."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def init_pair(
    key: Array,
    name: str,
    target: Target | None,
    shape: tuple[int, int, int],
    dtype=jnp.float32,
    leading: tuple[int, ...] = (),
) -> tuple[Float[Array, "*E r K"], Float[Array, "*E N r"]]:
    """A and B of one module, padded with zeros from its own rank to r; all zeros where it has no target.

    A follows PEFT: kaiming-uniform with a = √5, which is U(-1/√K, 1/√K).

    Args:
      shape: (N, K, r).
      leading: (E,) where each of E experts has a pair.
    """
    outputs, inputs, rank = shape
    own, bound = target.rank if target else 0, inputs**-0.5
    A = jax.random.uniform(key_for(key, name), (*leading, rank, inputs), dtype, -bound, bound)
    A = jnp.where(jnp.arange(rank)[:, None] < own, A, 0)
    return A, jnp.zeros((*leading, outputs, rank), dtype)
