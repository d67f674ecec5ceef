"""Ministral 3: Mistral with queries that grow with their position."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Ministral3Config."""
    parameters = hf.rope_parameters
    beta = parameters.get("llama_4_scaling_beta")
    grown = (beta, parameters["original_max_position_embeddings"]) if beta else None
    layer = LayerSpec(LayerKind(attention(hf, temperature=grown), mlp(hf)), hf.sliding_window or 0, rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers)
