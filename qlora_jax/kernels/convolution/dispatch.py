"""The causal depthwise convolution over packed documents, with a state to go on from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_convolution(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C 1 K"],
    bias: Float[Array, " C"] | None,
    starts: Int[Array, "B T"],
    state: Float[Array, "B K-1 C"] | None = None,
    counts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Σ weight[:, 0, i] · x[t − (K − 1) + i] + bias over the tokens of t's document; and the last K − 1 inputs.

    Added up in float32 and rounded once, to x's dtype.

    Args:
      weight: as the checkpoint's conv1d has it.
      starts: the same number for the tokens of one document, as `document_starts` gives it.
      state: the last inputs before these, the newest last, zero where there were none. The row's first document goes on
        from them. None: there are none.
      counts: how many tokens of each row count. The rest is padding: it does not come into the state, and its outputs
        mean nothing. None: all count.
    """
    width, length = weight.shape[2], x.shape[1]
    if state is None:
        state = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    documents = jnp.pad(starts, ((0, 0), (width - 1, 0)), mode="edge")
    after = jnp.full(x.shape[:1], length) if counts is None else counts
    return _sum_of_taps(inputs, weight, bias, documents), _last_inputs(inputs, documents, after, width)


# A checkpoint, or the backward pass would keep K copies of the inputs.
@jax.checkpoint
def _sum_of_taps(inputs, weight, bias, documents) -> Array:
    width = weight.shape[2]
    length = inputs.shape[1] - width + 1
    own = documents[:, width - 1 :]
    y = jnp.float32(0) if bias is None else bias.astype(jnp.float32)
    for i in range(width):
        same = (documents[:, i : i + length] == own)[..., None]
        tap = weight[:, 0, i].astype(jnp.float32)
        y = y + jnp.where(same, inputs[:, i : i + length].astype(jnp.float32), 0) * tap
    return y.astype(inputs.dtype)


def _last_inputs(inputs, documents, counts: Int[Array, " B"], width: int) -> Array:
    """The inputs before place `counts`, and zeros for those of another document than the last token's."""
    places = counts[:, None] + jnp.arange(width - 1)
    last = jnp.take_along_axis(documents, counts[:, None] + width - 2, axis=1)
    same = jnp.take_along_axis(documents, places, axis=1) == last
    return jnp.where(same[..., None], jnp.take_along_axis(inputs, places[..., None], axis=1), 0)
