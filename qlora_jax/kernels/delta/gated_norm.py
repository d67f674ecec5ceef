"""The norm behind the gated delta rule: y / rms(y) · w · silu(gate)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gated_norm(
    y: Float[Array, "*B V"], gate: Float[Array, "*B V"], weight: Float[Array, " V"], eps: float
) -> Float[Array, "*B V"]:
    """Normalised in float32 over one head's values, gated in float32, in y's dtype.

    transformers rounds twice on the way, and so does this: the normal to y's dtype, its product with the weight to the
    wider dtype of the two.
    """
    wide = y.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    dtype = jnp.promote_types(y.dtype, weight.dtype)
    scaled = weight.astype(dtype) * normal.astype(y.dtype).astype(dtype)
    return (scaled.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(y.dtype)
