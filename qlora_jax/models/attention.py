"""Causal grouped-query attention over packed documents, with an optional sliding window and an optional cache."""

from typing import NamedTuple

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.layers import Linear, RMSNorm, linear_group, subkey
from qlora_jax.models.rope import rotate


def attention_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Bool[Array, "B 1 T S"]:
    """True where a query may see a key: the same document, not later, and within `window` tokens (0: no limit)."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    near = (window == 0) | (distance < window)
    same = segments[:, :, None] == key_segments[:, None, :]
    return (same & (distance >= 0) & near)[:, None]


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    Attributes:
      rope: cos and sin of the tokens' positions.
      positions, segments: int32 `[B, T]` of the tokens.
      key_positions, key_segments: int32 `[B, S]` of what they may look at: themselves, or the cache's slots.
      start: int32 scalar, the cache slot of the first token.
    """

    rope: tuple[Array, Array]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    key_segments: Int[Array, "B S"]
    start: Int[Array, ""]


class Attention(nnx.Module):
    """Projections, rotation and attention of one layer."""

    def __init__(self, config: ModelConfig, q_proj, k_proj, v_proj, o_proj, q_norm=None, k_norm=None):
        self.config = config
        self.q_proj: Linear = q_proj
        self.k_proj: Linear = k_proj
        self.v_proj: Linear = v_proj
        self.o_proj: Linear = o_proj
        self.q_norm: RMSNorm | None = q_norm
        self.k_norm: RMSNorm | None = k_norm

    def __call__(self, x: Float[Array, "B T D"], context: Context, window, cache=None, key=None):
        """Returns the output `[B, T, D]` and the layer's new (k, v) `[B, S, K, H]` where there is a cache."""
        q, k, v = self._project(x, context, key)
        if cache is not None:
            start = (0, context.start, 0, 0)
            k = lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), start)
            v = lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), start)
        mask = attention_mask(context.positions, context.segments, context.key_positions, context.key_segments, window)
        y = jax.nn.dot_product_attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            mask=mask,
            scale=self.config.head_dim**-0.5,
            implementation="xla",
        )
        y = self.o_proj(y.reshape(*x.shape[:-1], -1), subkey(key, "o"))
        return y, (None if cache is None else (k, v))

    def _project(self, x, context: Context, key):
        projections = [self.q_proj, self.k_proj, self.v_proj]
        ys = linear_group(x, projections, [subkey(key, name) for name in "qkv"])
        q, k, v = (y.reshape(*x.shape[:-1], -1, self.config.head_dim) for y in ys)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(q, *context.rope), rotate(k, *context.rope), v
