"""ERNIE 4.5, dense: Llama that rotates pairs."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Ernie4_5Config."""
    kind = LayerKind(attention(hf, qkv_bias=hf.use_bias, output_bias=hf.use_bias), mlp(hf, bias=hf.use_bias))
    return ModelConfig(**model_fields(hf), layers=(LayerSpec(kind, rope=rope(hf, pairs=True)),) * hf.num_hidden_layers)
