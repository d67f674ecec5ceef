"""Causal grouped-query attention over packed documents, with an optional sliding window and an optional cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.kernels.attention import attend
from qlora_jax.models.blocks.block import ArrayPart, Block, LinearPart, NormPart, Part
from qlora_jax.models.blocks.context import Context, Own, first_keys
from qlora_jax.models.blocks.key_values import KeyValues
from qlora_jax.models.blocks.linear import Linear, linear_group, subkey
from qlora_jax.models.blocks.norm import RMSNorm, normal
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.rope import rotate
from qlora_jax.models.specs import AttentionSpec, NormSpec


class Attention(Block):
    """Projections, rotation and attention of one layer."""

    Cache = KeyValues
    CUTS = True  # a text in the cache can be cut back to its first tokens
    spec: AttentionSpec
    sinks: nnx.Variable | None

    @classmethod
    def parts(cls, spec: AttentionSpec, config: ModelConfig) -> dict[str, Part | None]:
        D, heads = config.hidden_size, spec.heads * spec.head_dim
        return {
            **_projections(spec, D),
            spec.output: LinearPart(D, heads, ("embed", "heads"), spec.output_bias),
            **_norms(spec, spec.norm or config.norm),
            "sinks": ArrayPart((spec.heads,), ("heads",), 0.0) if spec.sinks else None,
        }

    def __init__(self, spec: AttentionSpec, config: ModelConfig, values, kind):
        super().__init__(spec, config, values, kind)
        self.norm: NormSpec = spec.norm or config.norm

    def __call__(self, x: Float[Array, "B T D"], context: Context, own: Own, rope, cache=None):
        """Returns the output `[B, T, D]` and the cache with these tokens in it, None where there is none.

        Args:
          rope: cos and sin of the tokens' positions, and whether pairs are rotated; None for no rotation.
          cache: of keys and values; for a layer that borrows, the cache of the layer that it borrows from.
        """
        spec, key = self.spec, subkey(own.key, "attention")
        q, k, v, gate = self._project(x, key)
        q = self._turned(q, rope, spec.norm_names[0])
        if spec.temperature is not None:
            q = (q * _temperature(context.positions, *spec.temperature)).astype(q.dtype)
        if k is not None:
            k = self._turned(k, rope, spec.norm_names[1])
            if cache is not None:
                cache = cache.append(k, v, context.start)
        if cache is not None:
            k, v = cache.read(q.dtype)
        y = attend(
            q,
            k,
            v,
            first_keys(context, own.window),
            context.start,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            soft_cap=spec.soft_cap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        y = y.reshape(*x.shape[:-1], -1)
        if gate is not None:
            y *= jax.nn.sigmoid(gate)
        return getattr(self, spec.output)(y, subkey(key, "o")), cache

    def _project(self, x, key):
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` or None where they are borrowed, gates or None."""
        spec = self.spec
        names = list(_projections(spec, 0))
        linears: list[Linear] = [getattr(self, name) for name in names]
        keys = [subkey(key, name.removesuffix("_proj")) for name in names]
        ys = dict(zip(names, linear_group(x, linears, keys), strict=True))
        if spec.fused:
            ends = spec.heads * spec.head_dim, (spec.heads + spec.kv_heads) * spec.head_dim
            ys = dict(zip(("q_proj", "k_proj", "v_proj"), jnp.split(ys["qkv_proj"], ends, axis=-1), strict=True))
        q, gate = ys["q_proj"], ys.get(spec.gate)
        if spec.gate == "interleaved":
            both = q.reshape(*x.shape[:-1], spec.heads, 2, spec.head_dim)
            q, gate = (both[..., half, :].reshape(*x.shape[:-1], -1) for half in (0, 1))
        q = self._heads(q, spec.norm_names[0])
        if spec.borrows:
            return q, None, None, gate
        k = self._heads(ys["k_proj"], spec.norm_names[1])
        v = k if spec.keys_are_values else self._clipped(ys["v_proj"]).reshape(k.shape)
        return q, k, normal(v, self.norm.eps).astype(v.dtype) if spec.value_norm else v, gate

    def _heads(self, x: Float[Array, "B T C"], norm: str) -> Float[Array, "B T N H"]:
        """Queries or keys of each head, normalised where that is done to all heads as one vector."""
        x = self._clipped(getattr(self, norm)(x) if self.spec.qk_norm == "whole" else x)
        return x.reshape(*x.shape[:-1], -1, self.spec.head_dim)

    def _clipped(self, x):
        return jnp.clip(x, -self.spec.clip, self.spec.clip) if self.spec.clip else x

    def _turned(self, x: Float[Array, "B T N H"], rope, norm: str) -> Float[Array, "B T N H"]:
        """Queries or keys, normalised and rotated."""
        if self.spec.rotated_first:
            return self._normal(_rotated(x, rope), norm)
        return _rotated(self._normal(x, norm), rope)

    def _normal(self, x, name: str):
        if self.spec.qk_norm == "head":
            own: RMSNorm = getattr(self, name)
            return own(x)
        return normal(x, self.norm.eps).astype(x.dtype) if self.spec.qk_norm == "scaleless" else x


def _projections(spec: AttentionSpec, D: int) -> dict[str, Part | None]:
    """The projections of x, in their order."""
    heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.fused:
        return {"qkv_proj": LinearPart(heads + 2 * kv_heads, D, ("heads", "embed"), spec.qkv_bias)}
    query = LinearPart(heads * (2 if spec.gate == "interleaved" else 1), D, ("heads", "embed"), spec.qkv_bias)
    other = LinearPart(kv_heads, D, ("kv_heads", "embed"), spec.qkv_bias)
    found: dict[str, Part | None] = {"q_proj": query}
    if not spec.borrows:
        found |= {"k_proj": other} if spec.keys_are_values else {"k_proj": other, "v_proj": other}
    if spec.gate not in ("", "interleaved"):
        found[spec.gate] = LinearPart(heads, D, ("heads", "embed"), spec.qkv_bias)
    return found


def _norms(spec: AttentionSpec, norm: NormSpec) -> dict[str, Part | None]:
    if spec.qk_norm not in ("head", "whole"):
        return {}
    query, key = spec.norm_names
    whole = spec.qk_norm == "whole"
    sizes = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim) if whole else (spec.head_dim, spec.head_dim)
    parts: dict[str, Part | None] = {query: NormPart(sizes[0], norm, "head"), key: NormPart(sizes[1], norm, "head")}
    return {query: parts[query]} if spec.borrows else parts


def _rotated(x, rope):
    return x if rope is None else rotate(x, rope[0], rope[1], pairs=rope[2])


def _temperature(positions, beta: float, floor: int) -> Float[Array, "B T 1 1"]:
    """1 + β · log(1 + ⌊position / floor⌋)."""
    return (1 + beta * jnp.log1p(jnp.floor(positions / floor)))[..., None, None]
