"""The text part of Qwen2.5-VL and Qwen3-VL: without images their rotation in three sections is the usual one."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen2_5_VLTextConfig or Qwen3VLTextConfig."""
    if hf.model_type == "qwen3_vl_text":
        mixer = attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, qk_norm="head")
    else:
        mixer = attention(hf, qkv_bias=True)
    return ModelConfig(
        **model_fields(hf), layers=(LayerSpec(LayerKind(mixer, mlp(hf)), rope=rope(hf)),) * hf.num_hidden_layers
    )
