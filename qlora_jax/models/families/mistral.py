"""Mistral: Llama with one sliding window for all layers."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import shared_fields


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' MistralConfig."""
    return ModelConfig(**shared_fields("mistral", hf), windows=(hf.sliding_window or 0,) * hf.num_hidden_layers)
