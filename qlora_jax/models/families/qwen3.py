"""Qwen3 (dense): queries and keys normalised per head."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import shared_fields
from qlora_jax.models.families.qwen2 import windows


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen3Config."""
    return ModelConfig(
        **shared_fields("qwen3", hf),
        windows=windows(hf),
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        qk_norm=True,
    )
