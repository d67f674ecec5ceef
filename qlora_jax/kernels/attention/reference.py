"""The definition of attention in plain JAX, with the whole score matrix. Every implementation is held to it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite, so that a row without any visible key has no inf - inf in its softmax.
HIDDEN = -1e30


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    start: Int[Array, "B T"],
    offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scores) · V over the keys that each query sees; see `attend` for the arguments."""
    batch, length, heads, size = q.shape
    keys = jnp.arange(k.shape[1])
    own = jnp.reshape(offset, (-1, 1)) + jnp.arange(length)
    visible = ((keys >= start[..., None]) & (keys <= own[..., None]))[:, None, None]
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * scale
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible, scores, HIDDEN)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(column, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    weights = jnp.where(visible, weights, 0).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)
