"""Qwen2-MoE: Qwen2 with experts, of which one that all tokens go through has a gate."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, mlp, model_fields, rope, sparse_layers, windows
from qlora_jax.models.specs import LayerKind, LayerSpec, MoESpec


def with_shared(hf) -> MoESpec:
    """The experts of Qwen's models whose shared expert has a gate."""
    shared = mlp(hf, inner=hf.shared_expert_intermediate_size, name="shared_expert")
    return mixture(hf, shared=shared, shared_gate="shared_expert_gate")


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen2MoeConfig."""
    mixer, both = attention(hf, qkv_bias=hf.qkv_bias), (mlp(hf), with_shared(hf))
    kinds = [LayerKind(mixer, both[sparse]) for sparse in sparse_layers(hf)]
    layers = tuple(LayerSpec(kind, window, rope(hf)) for kind, window in zip(kinds, windows(hf), strict=True))
    return ModelConfig(**model_fields(hf), layers=layers)
