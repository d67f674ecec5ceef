"""Seed-OSS: Llama with biases of queries, keys and values."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' SeedOssConfig."""
    mixer = attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_out_bias)
    layer = LayerSpec(LayerKind(mixer, mlp(hf, bias=hf.mlp_bias)), rope=rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
