"""Gemma 3, text: five layers with a window to one without, each kind with a rotation of its own."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, layer_ropes, mlp, positive, windows
from qlora_jax.models.families.gemma2 import gemma_fields
from qlora_jax.models.specs import SANDWICH_NORMS, LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Gemma3TextConfig."""
    scale, cap = positive(hf, "query_pre_attn_scalar") ** -0.5, hf.attn_logit_softcapping or 0.0
    mixer = attention(
        hf, scale=scale, soft_cap=cap, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, qk_norm="head"
    )
    kind = LayerKind(mixer, mlp(hf), SANDWICH_NORMS)
    layers = zip(windows(hf), layer_ropes(hf), strict=True)
    return ModelConfig(**gemma_fields(hf), layers=tuple(LayerSpec(kind, *layer) for layer in layers))
