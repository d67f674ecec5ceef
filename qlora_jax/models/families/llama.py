"""Llama 2, 3, 3.1, 3.2, TinyLlama, and what shares their architecture."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' LlamaConfig."""
    mixer = attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias)
    layer = LayerSpec(LayerKind(mixer, mlp(hf, bias=hf.mlp_bias)), rope=rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
