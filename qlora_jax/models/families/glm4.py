"""GLM-4: norms before and after each block, pairs of half the dimensions rotated, gates and ups in one projection."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerNorms, LayerSpec

NORMS = LayerNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Glm4Config."""
    names = ("gate_up_proj", "gate_up_proj", "down_proj")
    kind = LayerKind(attention(hf, qkv_bias=hf.attention_bias), mlp(hf, fused=True, names=names), NORMS)
    layer = LayerSpec(kind, rope=rope(hf, pairs=True))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
