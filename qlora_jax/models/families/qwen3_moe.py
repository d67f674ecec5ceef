"""Qwen3-MoE: Qwen3 with experts in place of the MLP."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, mlp, model_fields, rope, sparse_layers
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen3MoeConfig."""
    bias, both = hf.attention_bias, (mlp(hf), mixture(hf))
    mixer = attention(hf, qkv_bias=bias, output_bias=bias, qk_norm="head")
    kinds = [LayerKind(mixer, both[sparse]) for sparse in sparse_layers(hf)]
    layers = tuple(LayerSpec(kind, hf.sliding_window or 0, rope(hf)) for kind in kinds)
    return ModelConfig(**model_fields(hf), layers=layers)
