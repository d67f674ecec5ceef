"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window in the later layers where asked for."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import shared_fields


def windows(hf) -> tuple[int, ...]:
    """Each layer's window from `layer_types`."""
    return tuple(hf.sliding_window if kind == "sliding_attention" else 0 for kind in hf.layer_types)


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen2Config."""
    return ModelConfig(**shared_fields("qwen2", hf), windows=windows(hf), qkv_bias=True)
