"""Hunyuan dense: queries and keys normalised per head after they are rotated."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' HunYuanDenseV1Config."""
    bias, norms = hf.attention_bias, ("query_layernorm", "key_layernorm")
    mixer = attention(hf, qkv_bias=bias, output_bias=bias, qk_norm="head", norm_names=norms, rotated_first=True)
    layer = LayerSpec(LayerKind(mixer, mlp(hf)), rope=rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
