"""Mistral: Llama with one sliding window for all layers."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' MistralConfig."""
    layer = LayerSpec(LayerKind(attention(hf), mlp(hf)), hf.sliding_window or 0, rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
