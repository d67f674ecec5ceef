"""The definition of the causal depthwise convolution: one token after another. What runs is held to it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def forward(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C 1 K"],
    bias: Float[Array, " C"] | None,
    starts: Int[Array, "B T"],
    state: Float[Array, "B K-1 C"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Each token's weighted sum of the last K inputs, and the last K − 1 inputs. See `causal_convolution`."""
    taps = weight[:, 0].T.astype(jnp.float32)

    def token(carry, xs):
        before, document = carry
        x, start = xs
        before = jnp.where((start == document)[:, None, None], before, 0)
        seen = jnp.concatenate([before, x[:, None]], axis=1)
        y = jnp.sum(seen.astype(jnp.float32) * taps, axis=1)
        y = y if bias is None else y + bias.astype(jnp.float32)
        return (seen[:, 1:], start), y.astype(x.dtype)

    (state, _), y = lax.scan(token, (state, starts[:, 0]), (jnp.moveaxis(x, 1, 0), starts.T))
    return jnp.moveaxis(y, 0, 1), state
