"""Llama 2, 3, 3.1, 3.2, TinyLlama, and what shares their architecture."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import shared_fields


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' LlamaConfig."""
    return ModelConfig(
        **shared_fields("llama", hf),
        windows=(0,) * hf.num_hidden_layers,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
