"""GLM-4.5 and 4.6: half the dimensions rotated, experts chosen by corrected scores, the first layers dense."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, mlp, model_fields, rope
from qlora_jax.models.names import Names
from qlora_jax.models.specs import LayerKind, LayerSpec, RouterSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Glm4MoeConfig."""
    router = RouterSpec(
        rule="sigmoid",
        renormalize=hf.norm_topk_prob,
        scaling=hf.routed_scaling_factor,
        wide=True,
        correction="e_score_correction_bias",
        groups=(hf.n_group, hf.topk_group),
    )
    shared = mlp(hf, inner=hf.moe_intermediate_size * hf.n_shared_experts, name="shared_experts")
    experts = mixture(hf, experts=hf.n_routed_experts, router=router, shared=shared)
    mixer = attention(hf, qkv_bias=hf.attention_bias, qk_norm="head" if hf.use_qk_norm else None)
    count, dense = hf.num_hidden_layers, hf.first_k_dense_replace
    kinds = [LayerKind(mixer, mlp(hf) if layer < dense else experts) for layer in range(count)]
    # What predicts several tokens at once is stored as one more layer.
    names = Names(passed=(f"model.layers.{count}.",))
    return ModelConfig(**model_fields(hf), layers=tuple(LayerSpec(kind, 0, rope(hf)) for kind in kinds), names=names)
