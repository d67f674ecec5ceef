"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window in the later layers where asked for."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import shared_fields


def windows(hf) -> tuple[int, ...]:
    """Each layer's window from `layer_types`.

    Raises:
      ValueError: a sliding layer without a window. NotImplementedError: another kind of layer.
    """
    kinds = set(hf.layer_types)
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layer_types {sorted(kinds)} are not supported, only full_ and sliding_attention")
    if "sliding_attention" in kinds and hf.sliding_window is None:
        raise ValueError("layer_types names sliding_attention, but sliding_window is null")
    return tuple(hf.sliding_window if kind == "sliding_attention" else 0 for kind in hf.layer_types)


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen2Config."""
    return ModelConfig(**shared_fields("qwen2", hf), windows=windows(hf), qkv_bias=True)
