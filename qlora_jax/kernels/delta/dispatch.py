"""The gated delta rule over packed documents, with a state to go on from."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qlora_jax.kernels.delta import chunked, reference

# So few tokens (a step of generation) take one after another: the products of a chunk would be mostly padding.
FEW_TOKENS = 8


def gated_delta(
    q: Float[Array, "B T Hk Dk"],
    k: Float[Array, "B T Hk Dk"],
    v: Float[Array, "B T Hv Dv"],
    decay: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    starts: Int[Array, "B T"],
    state: Float32[Array, "B Hv Dk Dv"] | None = None,
    counts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T Hv Dv"], Float32[Array, "B Hv Dk Dv"]]:
    """The outputs in v's dtype, and the state after the last token. Computed in float32.

    Args:
      q, k: not normalised. Each key head serves Hv / Hk value heads that follow one another.
      decay: the logarithm (at most 0) of what a token leaves of the state.
      beta: which part a token replaces of what the state has for its key, 0 to 1.
      starts: the same number for the tokens of one document, as `document_starts` gives it. A document that is not its
        row's first begins with no state.
      state: that of the tokens before. The row's first document goes on from it. None: there are none.
      counts: how many tokens of each row count. The rest is padding: it leaves the state alone, whatever it holds, and
        its outputs mean nothing. None: all count.

    Raises:
      ValueError: the value heads are no multiple of the key heads.
    """
    (batch, length, key_heads, key_size), (heads, size) = k.shape, v.shape[2:]
    if heads % key_heads:
        raise ValueError(f"{heads} value heads of v must be a multiple of {key_heads} key heads of k")
    if state is None:
        state = jnp.zeros((batch, heads, key_size, size), jnp.float32)
    decay, beta = decay.astype(jnp.float32), beta.astype(jnp.float32)
    if counts is not None:
        q, k, v, decay, beta = (_without_padding(x, counts) for x in (q, k, v, decay, beta))
        starts = jnp.take_along_axis(starts, _last_that_counts(length, counts), axis=1)
    v, decay, beta = (x.reshape(batch, length, key_heads, -1, *x.shape[3:]) for x in (v, decay, beta))
    forward = reference.forward if length <= FEW_TOKENS else chunked.forward
    y, after = forward(q, k, v, decay, beta, starts, state.reshape(batch, key_heads, -1, *state.shape[2:]))
    return y.reshape(batch, length, heads, size), after.reshape(state.shape)


def _without_padding(x: Array, counts: Int[Array, " B"]) -> Array:
    """Zeros in place of padding: nothing fades, nothing is replaced, and no NaN of the padding's gets in."""
    place = jnp.arange(x.shape[1]).reshape(1, -1, *[1] * (x.ndim - 2))
    return jnp.where(place < counts.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _last_that_counts(length: int, counts: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Of each token its own place, of padding that of the last token before it: padding begins no document."""
    return jnp.minimum(jnp.arange(length), jnp.maximum(counts - 1, 0)[:, None])
