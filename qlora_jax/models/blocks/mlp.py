"""The feed-forward part of a layer."""

from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.models.blocks.block import Block, LinearPart, Part
from qlora_jax.models.blocks.linear import Linear, linear_group, many_rows, subkey
from qlora_jax.models.config import ModelConfig


class MLP(Block):
    """down(silu(gate(x)) · up(x))."""

    NAME = "mlp"
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @classmethod
    def parts(cls, config: ModelConfig) -> dict[str, Part | None]:
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        return {
            "gate_proj": LinearPart(F, D, ("mlp", "embed"), bias),
            "up_proj": LinearPart(F, D, ("mlp", "embed"), bias),
            "down_proj": LinearPart(D, F, ("embed", "mlp"), bias),
        }

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Float[Array, "B T D"]:
        gate, up = linear_group(x, [self.gate_proj, self.up_proj], [subkey(key, "gate"), subkey(key, "up")])
        if self.gate_proj.lora is not None and self.up_proj.lora is not None and many_rows(x):
            # Products and updates are added here, not where they are used: two activations of this width less.
            gate, up = lax.optimization_barrier((gate, up))
        return self.down_proj(nnx.silu(gate) * up, subkey(key, "down"))
