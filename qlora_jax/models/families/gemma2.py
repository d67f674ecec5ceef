"""Gemma 2: norms before and after each block, soft caps on scores and logits, a window in every other layer."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, positive, rope, windows
from qlora_jax.models.specs import SANDWICH_NORMS, LayerKind, LayerSpec, NormSpec


def gemma_fields(hf) -> dict:
    """What all Gemmas share: norms of 1 + w, scaled embeddings, and a soft cap on logits where there is one."""
    norm = NormSpec(eps=hf.rms_norm_eps, offset=1.0, wide=True)
    return model_fields(hf) | dict(
        norm=norm,
        embedding_multiplier=hf.hidden_size**0.5,
        logit_soft_cap=hf.final_logit_softcapping or 0.0,
    )


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Gemma2Config."""
    scale, cap = positive(hf, "query_pre_attn_scalar") ** -0.5, hf.attn_logit_softcapping or 0.0
    mixer = attention(hf, scale=scale, soft_cap=cap)
    kind = LayerKind(mixer, mlp(hf), SANDWICH_NORMS)
    return ModelConfig(**gemma_fields(hf), layers=tuple(LayerSpec(kind, window, rope(hf)) for window in windows(hf)))
