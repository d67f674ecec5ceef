"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: one projection for queries, keys and values, and one for gates and ups."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Phi3Config."""
    names = ("gate_up_proj", "gate_up_proj", "down_proj")
    kind = LayerKind(attention(hf, fused=True), mlp(hf, fused=True, names=names))
    layer = LayerSpec(kind, hf.sliding_window or 0, rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
