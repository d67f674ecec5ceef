"""Feed-forward blocks with experts: a mixture of them, alone or beside an MLP."""

import jax
from jaxtyping import Array, Bool, Float

from qlora_jax.kernels.experts.router import Balance, balance
from qlora_jax.models.blocks.block import Block, BlockPart, LinearPart, NormPart, Part
from qlora_jax.models.blocks.experts import Experts
from qlora_jax.models.blocks.linear import Linear, subkey
from qlora_jax.models.blocks.mlp import MLP
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.blocks.router import Router, ScaledRouter
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import BesideSpec, MoESpec


class MoE(Block):
    """The experts that a router chooses for each token, and perhaps one that all tokens go through."""

    spec: MoESpec
    experts: Experts

    @classmethod
    def parts(cls, spec: MoESpec, config: ModelConfig) -> dict[str, Part | None]:
        found: dict[str, Part | None] = {
            spec.router.name: BlockPart(Router, spec, config),
            "experts": BlockPart(Experts, spec, config),
        }
        if spec.shared:
            found[spec.shared.name] = BlockPart(MLP, spec.shared, config)
        if spec.shared_gate:
            found[spec.shared_gate] = LinearPart(1, config.hidden_size, ("gate", "embed"), role="gate")
        return found

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Float[Array, "B T D"]:
        router: Router = getattr(self, self.spec.router.name)
        y = self.experts(x, router(x.reshape(-1, x.shape[-1])))
        return y if self.spec.shared is None else y + self._shared(x, key)

    def balance(self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"]) -> Balance:
        """What the load-balancing loss is made of, of this layer and x."""
        router: Router = getattr(self, self.spec.router.name)
        return balance(router.logits(x.reshape(-1, x.shape[-1])), self.spec.top_k, counted.reshape(-1))

    def _shared(self, x: Float[Array, "B T D"], key) -> Float[Array, "B T D"]:
        assert self.spec.shared is not None
        shared: MLP = getattr(self, self.spec.shared.name)
        y = shared(x, subkey(key, "shared"))
        if not self.spec.shared_gate:
            return y
        gate: Linear = getattr(self, self.spec.shared_gate)
        return y * jax.nn.sigmoid(gate(x, subkey(key, "shared_gate")))


class Beside(Block):
    """norm₁(mlp(norm(x))) + norm₂(experts(norm₃(x))), the router seeing x itself (Gemma 4)."""

    spec: BesideSpec
    pre_feedforward_layernorm: RMSNorm
    pre_feedforward_layernorm_2: RMSNorm
    post_feedforward_layernorm_1: RMSNorm
    post_feedforward_layernorm_2: RMSNorm
    mlp: MLP
    router: ScaledRouter
    experts: Experts

    @classmethod
    def parts(cls, spec: BesideSpec, config: ModelConfig) -> dict[str, Part | None]:
        norms = [name for name in cls.__annotations__ if name.endswith(("layernorm", "layernorm_1", "layernorm_2"))]
        return {
            **{name: NormPart(config.hidden_size, config.norm) for name in norms},
            "mlp": BlockPart(MLP, spec.mlp, config),
            "router": BlockPart(ScaledRouter, spec.moe, config),
            "experts": BlockPart(Experts, spec.moe, config),
        }

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Float[Array, "B T D"]:
        dense = self.mlp(self.pre_feedforward_layernorm(x), subkey(key, "dense"))
        routed = self.router(x, subkey(key, "router"))
        chosen = self.experts(self.pre_feedforward_layernorm_2(x), routed)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(chosen)
