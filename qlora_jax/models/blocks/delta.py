"""Gated DeltaNet: a linear recurrence over tokens, within their document, with an optional state to go on from."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.kernels.delta import gated_delta, gated_norm
from qlora_jax.models.blocks.activations import ACTIVATIONS
from qlora_jax.models.blocks.block import ArrayPart, Block, LinearPart, NormPart, Part
from qlora_jax.models.blocks.context import Context, Own, row_counts
from qlora_jax.models.blocks.convolution import Convolution, ConvolutionPart
from qlora_jax.models.blocks.linear import Linear, linear_group, subkey
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.blocks.states import DeltaState
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import DeltaSpec


class GatedDelta(Block):
    """Projections, convolution, gated delta rule and gated norm of one layer."""

    Cache = DeltaState
    CUTS = False  # a state is that after the last token, and no other
    spec: DeltaSpec
    conv1d: Convolution
    dt_bias: nnx.Variable
    A_log: nnx.Variable
    norm: RMSNorm
    out_proj: Linear

    @classmethod
    def parts(cls, spec: DeltaSpec, config: ModelConfig) -> dict[str, Part | None]:
        heads = ((spec.value_heads,), ("heads",))
        return {
            **_projections(spec, config.hidden_size),
            "conv1d": ConvolutionPart(2 * spec.keys + spec.values, spec.kernel, "heads"),
            "dt_bias": ArrayPart(*heads, 1.0),
            "A_log": ArrayPart(*heads, 0.0),
            "norm": NormPart(spec.value_dim, spec.norm, "head"),
            "out_proj": LinearPart(config.hidden_size, spec.values, ("embed", "heads")),
        }

    def __call__(self, x: Float[Array, "B T D"], context: Context, own: Own, rope, cache=None):
        """Returns the output `[B, T, D]` and the cache with these tokens in it, None where there is none.

        Args:
          rope: not used: the recurrence itself says which token comes after which.
          cache: of states.
        """
        spec, key = self.spec, subkey(own.key, "attention")
        qkv, z, b, a = self._project(x, key)
        before = None if cache is None else cache.read(context.start)
        qkv, inputs = self.conv1d(qkv, context, None if before is None else before.inputs)
        # In 16 bits, what the convolution gives is rounded before it is activated, and so is beta: as in transformers.
        q, k, v = jnp.split(ACTIVATIONS[spec.activation](qkv), (spec.keys, 2 * spec.keys), axis=-1)
        y, memory = gated_delta(
            _heads(q, spec.key_heads),
            _heads(k, spec.key_heads),
            _heads(v, spec.value_heads),
            self._decay(a),
            jax.nn.sigmoid(b),
            context.first,
            None if before is None else before.memory,
            row_counts(context, x.shape[0]),
        )
        y = gated_norm(y, _heads(z, spec.value_heads), self.norm.weight.get_value(), self.norm.spec.eps)
        cache = None if cache is None else cache.write(DeltaState(inputs, memory))
        return self.out_proj(y.reshape(*x.shape[:-1], -1), subkey(key, "out")), cache

    def _project(self, x, key):
        """Queries, keys and values side by side, then z `[B, T, C]`, and b and a `[B, T, N]`."""
        names = list(_projections(self.spec, 0))
        half = len(names) // 2
        # Packed ones and gates apart: only packed ones share a launch.
        ys = [*self._group(x, names[:half], key), *self._group(x, names[half:], key)]
        return self._split(*ys) if self.spec.fused else ys

    def _group(self, x, names: list[str], key):
        return linear_group(x, [getattr(self, name) for name in names], [subkey(key, name) for name in names])

    def _split(self, qkvz: Float[Array, "B T E"], ba: Float[Array, "B T G"]):
        """What fused projections give: for each key head its queries, keys, values and z, and its b and a."""
        spec = self.spec
        each = spec.value_heads // spec.key_heads
        ends = spec.key_dim, 2 * spec.key_dim, 2 * spec.key_dim + each * spec.value_dim
        q, k, v, z = (_flat(part) for part in jnp.split(_heads(qkvz, spec.key_heads), ends, axis=-1))
        b, a = (_flat(part) for part in jnp.split(_heads(ba, spec.key_heads), 2, axis=-1))
        return jnp.concatenate([q, k, v], axis=-1), z, b, a

    def _decay(self, a: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        """The logarithm of what a token leaves of the state, in float32."""
        rate, bias = (value.get_value().astype(jnp.float32) for value in (self.A_log, self.dt_bias))
        return -jnp.exp(rate) * jax.nn.softplus(a.astype(jnp.float32) + bias)


def _projections(spec: DeltaSpec, D: int) -> dict[str, Part | None]:
    """The projections of x, the packed ones first."""

    def wide(outputs: int) -> LinearPart:
        return LinearPart(outputs, D, ("heads", "embed"))

    def gate(outputs: int) -> LinearPart:
        return LinearPart(outputs, D, ("heads", "embed"), role="gate")

    channels, heads = 2 * spec.keys + spec.values, spec.value_heads
    if spec.fused:
        return {"in_proj_qkvz": wide(channels + spec.values), "in_proj_ba": gate(2 * heads)}
    return {
        "in_proj_qkv": wide(channels),
        "in_proj_z": wide(spec.values),
        "in_proj_b": gate(heads),
        "in_proj_a": gate(heads),
    }


def _heads(x: Float[Array, "B T E"], heads: int) -> Float[Array, "B T N H"]:
    return x.reshape(*x.shape[:-1], heads, -1)


def _flat(x: Float[Array, "B T N H"]) -> Float[Array, "B T E"]:
    return x.reshape(*x.shape[:-2], -1)
