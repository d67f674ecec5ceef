"""Qwen3-Next, and the mixtures of Qwen3.5: hybrid layers with experts, and one that all tokens go through."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import mlp, sparse_layers
from qlora_jax.models.families.qwen2_moe import with_shared
from qlora_jax.models.families.qwen3_5 import hybrid


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen3NextConfig or Qwen3_5MoeTextConfig."""
    experts = with_shared(hf)
    if hf.model_type != "qwen3_next":
        return hybrid(hf, [experts] * hf.num_hidden_layers)
    return hybrid(hf, [experts if sparse else mlp(hf) for sparse in sparse_layers(hf)], fused=True)
