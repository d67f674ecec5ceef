"""Qwen3 (dense): queries and keys normalised per head."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope, windows
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen3Config."""
    mixer = attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, qk_norm="head")
    kind = LayerKind(mixer, mlp(hf))
    return ModelConfig(**model_fields(hf), layers=tuple(LayerSpec(kind, window, rope(hf)) for window in windows(hf)))
