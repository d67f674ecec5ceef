"""The definition of the gated delta rule (arXiv 2412.06464): one token after another. Every form is held to it."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

# Float32 means float32: by default XLA multiplies it in TF32 on NVIDIA's tensor cores, with bfloat16's error.
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
UNIT_EPS = 1e-6


def forward(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K G V"],
    decay: Float32[Array, "B T K G"],
    beta: Float32[Array, "B T K G"],
    starts: Int[Array, "B T"],
    state: Float32[Array, "B K G H V"],
) -> tuple[Float[Array, "B T K G V"], Float32[Array, "B K G H V"]]:
    """Each token's output and the state after the last one. See `gated_delta` for what the arguments mean.

    The state S maps keys to values. A token lets it fade, replaces a part `beta` of what it has for the token's key by
    the token's value, and reads it by the token's query:

        S ← exp(decay) · S;  S ← S + k ⊗ beta · (v − k · S);  y = q · S,  with k / |k| for k and q / |q| · H^-½ for q.
    """

    def token(carry, xs):
        state, document = carry
        q, k, v, decay, beta, start = xs
        same = (start == document)[:, None, None]
        state = jnp.where(same, jnp.exp(decay), 0)[..., None, None] * state
        change = beta[..., None] * (v.astype(jnp.float32) - einsum("BKGHV,BKH->BKGV", state, k))
        state = state + k[:, :, None, :, None] * change[..., None, :]
        return (state, start), einsum("BKGHV,BKH->BKGV", state, q).astype(v.dtype)

    xs = (unit(q) * q.shape[-1] ** -0.5, unit(k), v, decay, beta, starts)
    carry = (state, starts[:, 0])
    (state, _), y = lax.scan(token, carry, tuple(jnp.moveaxis(x, 1, 0) for x in xs))
    return jnp.moveaxis(y, 0, 1), state


def unit(x: Float[Array, "*B H"]) -> Float32[Array, "*B H"]:
    """x / |x|, with transformers' way around 0."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + UNIT_EPS)
