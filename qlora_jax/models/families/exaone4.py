"""EXAONE 4: norms after each block only; of its larger models the layers without a window have no positions."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope, windows
from qlora_jax.models.specs import POST_NORMS, LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Exaone4Config."""
    kind, turned = LayerKind(attention(hf, qk_norm="head"), mlp(hf), POST_NORMS), rope(hf)
    everywhere = hf.sliding_window is None
    layers = [LayerSpec(kind, window, turned if everywhere or window else turned.still) for window in windows(hf)]
    return ModelConfig(**model_fields(hf), layers=tuple(layers))
