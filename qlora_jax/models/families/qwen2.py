"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window in the later layers where asked for."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope, windows
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen2Config."""
    kind = LayerKind(attention(hf, qkv_bias=True), mlp(hf))
    return ModelConfig(**model_fields(hf), layers=tuple(LayerSpec(kind, window, rope(hf)) for window in windows(hf)))
