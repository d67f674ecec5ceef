"""Routers: which experts a token goes to. Their weights are never packed: few values decide much."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.kernels.experts.router import Routed, sigmoid_top_k, softmax_top_k, top_k_softmax
from qlora_jax.models.blocks.block import ArrayPart, Block, LinearPart, Part
from qlora_jax.models.blocks.linear import Linear, subkey
from qlora_jax.models.blocks.norm import normal
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.specs import MoESpec


class Router(Block):
    """The experts of each token, of logits x · Wᵀ + b."""

    spec: MoESpec
    weight: nnx.Variable

    @classmethod
    def parts(cls, spec: MoESpec, config: ModelConfig) -> dict[str, Part | None]:
        E, router = spec.experts, spec.router
        zero = ArrayPart((E,), ("experts",), 0.0)
        return {
            "weight": ArrayPart((E, config.hidden_size), ("experts", "embed")),
            **({"bias": zero} if router.bias else {}),
            # What chooses must not be rounded: neighbours differ by little.
            **({router.correction: ArrayPart((E,), ("experts",), 0.0, "float32")} if router.correction else {}),
        }

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """The scores of every expert."""
        dtype = jnp.float32 if self.spec.router.wide else x.dtype
        logits = jnp.einsum("TD,ED->TE", x.astype(dtype), self.weight.get_value().astype(dtype))
        return logits + self._array("bias").astype(dtype) if self.spec.router.bias else logits

    def __call__(self, x: Float[Array, "T D"]) -> Routed:
        """Each token's experts and their weights."""
        logits, k, router = self.logits(x), self.spec.top_k, self.spec.router
        if router.rule == "top_k_softmax":
            return top_k_softmax(logits, k)
        if router.rule == "softmax":
            return softmax_top_k(logits, k, renormalize=router.renormalize, scaling=router.scaling)
        correction = self._array(router.correction) if router.correction else jnp.zeros(logits.shape[1])
        return sigmoid_top_k(
            logits,
            k,
            correction=correction,
            renormalize=router.renormalize,
            groups=router.groups,
            scaling=router.scaling,
        )

    def _array(self, name: str):
        return getattr(self, name).get_value()


class ScaledRouter(Block):
    """Gemma 4's: logits of the normalised and scaled x; each expert's weight has a factor of its own."""

    spec: MoESpec
    proj: Linear
    scale: nnx.Variable
    per_expert_scale: nnx.Variable

    @classmethod
    def parts(cls, spec: MoESpec, config: ModelConfig) -> dict[str, Part | None]:
        return {
            "proj": LinearPart(spec.experts, config.hidden_size, ("experts", "embed"), role="gate"),
            "scale": ArrayPart((config.hidden_size,), ("embed",), 1.0),
            "per_expert_scale": ArrayPart((spec.experts,), ("experts",), 1.0),
        }

    def __init__(self, spec, config: ModelConfig, values, kind):
        super().__init__(spec, config, values, kind)
        self.eps = config.norm.eps

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        """Each token's experts and their weights, row by row. (A row may have an adapter of its own.)"""
        scaled = normal(x, self.eps).astype(x.dtype) * self.scale.get_value().astype(x.dtype)
        logits = self.proj(scaled * jnp.asarray(x.shape[-1] ** -0.5, x.dtype), subkey(key, "router"))
        scale = self.per_expert_scale.get_value()
        logits = logits.reshape(-1, logits.shape[-1])
        return softmax_top_k(logits, self.spec.top_k, renormalize=True, expert_scale=scale)
