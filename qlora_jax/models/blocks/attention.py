"""Causal grouped-query attention over packed documents, with an optional sliding window and an optional cache."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.kernels.attention import attend
from qlora_jax.models.blocks.block import Block, LinearPart, NormPart, Part
from qlora_jax.models.blocks.key_values import KeyValues, LayerKeyValues
from qlora_jax.models.blocks.linear import Linear, linear_group, subkey
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.rope import rotate


class Context(NamedTuple):
    """What every layer of one forward pass shares. Keys are numbered by their place in the row, or in the cache.

    Attributes:
      rope: cos and sin of the tokens' positions.
      first: int32 `[B, T]`, the first key that a token may look at, windows aside.
      start: which key the first token is: 0, or where there is a cache a traced int32, a scalar or one for each row.
    """

    rope: tuple[Array, Array]
    first: Int[Array, "B T"]
    start: int | Int[Array, ""] | Int[Array, " B"]


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where in its row each token's document begins. A document is a run of one segment id."""
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(begins, places, 0), axis=1)


def document_lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens each token's document has, up to the last of them in its row: that one's position and one."""
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    last = lax.cummin(jnp.where(ends, places, segments.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def window_starts(context: Context, window: Int[Array, ""]) -> Int[Array, "B T"]:
    """The first key that each token sees: of its document, and among the last `window` (0: no limit)."""
    own = jnp.reshape(context.start, (-1, 1)) + jnp.arange(context.first.shape[1], dtype=jnp.int32)
    return jnp.where(window == 0, context.first, jnp.maximum(context.first, own - window + 1))


class Attention(Block):
    """Projections, rotation and attention of one layer."""

    NAME = "self_attn"
    Cache = KeyValues
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    @classmethod
    def parts(cls, config: ModelConfig) -> dict[str, Part | None]:
        D, H = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * H, config.num_kv_heads * H
        norm = NormPart(H, config.norm_eps, "head") if config.qk_norm else None
        return {
            "q_proj": LinearPart(heads, D, ("heads", "embed"), config.qkv_bias),
            "k_proj": LinearPart(kv_heads, D, ("kv_heads", "embed"), config.qkv_bias),
            "v_proj": LinearPart(kv_heads, D, ("kv_heads", "embed"), config.qkv_bias),
            "o_proj": LinearPart(D, heads, ("embed", "heads"), config.output_bias),
            "q_norm": norm,
            "k_norm": norm,
        }

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, window, cache: LayerKeyValues | None = None, key=None
    ):
        """Returns the output `[B, T, D]` and the cache with these tokens in it, None where there is none."""
        q, k, v = self._project(x, context, key)
        if cache is not None:
            cache = cache.append(k, v, context.start)
            k, v = cache.read(q.dtype)
        y = attend(
            q,
            k,
            v,
            window_starts(context, window),
            context.start,
            scale=self.config.head_dim**-0.5,
            soft_cap=self.config.attention_soft_cap,
        )
        y = self.o_proj(y.reshape(*x.shape[:-1], -1), subkey(key, "o"))
        return y, cache

    def _project(self, x, context: Context, key):
        projections = [self.q_proj, self.k_proj, self.v_proj]
        ys = linear_group(x, projections, [subkey(key, name) for name in "qkv"])
        q, k, v = (y.reshape(*x.shape[:-1], -1, self.config.head_dim) for y in ys)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(q, *context.rope), rotate(k, *context.rope), v
