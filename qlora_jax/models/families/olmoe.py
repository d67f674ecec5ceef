"""OLMoE: queries and keys normalised whole, experts in place of the MLP."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' OlmoeConfig."""
    bias, clip = hf.attention_bias, hf.clip_qkv or 0.0
    mixer = attention(hf, qkv_bias=bias, output_bias=bias, qk_norm="whole", clip=clip)
    layer = LayerSpec(LayerKind(mixer, mixture(hf, inner=hf.intermediate_size)), rope=rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
