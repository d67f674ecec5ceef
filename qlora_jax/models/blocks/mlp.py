"""The feed-forward part of a layer."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.models.blocks.activations import ACTIVATIONS
from qlora_jax.models.blocks.block import Block, LinearPart, Part
from qlora_jax.models.blocks.linear import Linear, linear_group, many_rows, subkey
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import MLPSpec


class MLP(Block):
    """down(activation(gate(x)) · up(x))."""

    spec: MLPSpec

    @classmethod
    def parts(cls, spec: MLPSpec, config: ModelConfig) -> dict[str, Part | None]:
        D, F = config.hidden_size, spec.inner
        gate, up, down = spec.names
        wide = LinearPart(F, D, ("mlp", "embed"), spec.bias)
        first = {gate: LinearPart(2 * F, D, ("mlp", "embed"), spec.bias)} if spec.fused else {gate: wide, up: wide}
        return {**first, down: LinearPart(D, F, ("embed", "mlp"), spec.bias)}

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Float[Array, "B T D"]:
        gate, up = self._gate_and_up(x, key)
        down: Linear = getattr(self, self.spec.names[2])
        return down(ACTIVATIONS[self.spec.activation](gate) * up, subkey(key, "down"))

    def _gate_and_up(self, x, key):
        names = self.spec.names[: 1 if self.spec.fused else 2]
        linears = [getattr(self, name) for name in names]
        ys = linear_group(x, linears, [subkey(key, name) for name in ("gate", "up")[: len(linears)]])
        if all(linear.lora is not None for linear in linears) and many_rows(x):
            # Products and updates are added here, not where they are used: two activations of this width less.
            ys = lax.optimization_barrier(ys)
        return jnp.split(ys[0], 2, axis=-1) if self.spec.fused else ys
