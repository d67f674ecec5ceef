"""OLMo 2 and 3: norms after each block only, queries and keys normalised whole; OLMo 3 has windows."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, layer_ropes, mlp, model_fields, windows
from qlora_jax.models.specs import POST_NORMS, LayerKind, LayerSpec, NormSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Olmo2Config or Olmo3Config."""
    bias = hf.attention_bias
    kind = LayerKind(attention(hf, qkv_bias=bias, output_bias=bias, qk_norm="whole"), mlp(hf), POST_NORMS)
    sliding = windows(hf) if hf.model_type == "olmo3" else [0] * hf.num_hidden_layers
    layers = tuple(LayerSpec(kind, *layer) for layer in zip(sliding, layer_ropes(hf), strict=True))
    return ModelConfig(**model_fields(hf) | dict(norm=NormSpec(eps=hf.rms_norm_eps, wide=True)), layers=layers)
