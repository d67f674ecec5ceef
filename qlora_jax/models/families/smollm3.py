"""SmolLM3: Llama whose every fourth layer has no positions."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, by_layer, mlp, model_fields, rope, windows
from qlora_jax.models.specs import LayerKind, LayerSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' SmolLM3Config."""
    mixer = attention(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias)
    kind, turned = LayerKind(mixer, mlp(hf, bias=hf.mlp_bias)), rope(hf)
    ropes = [turned if turns else turned.still for turns in by_layer(hf, "no_rope_layers")]
    layers = zip(windows(hf), ropes, strict=True)
    return ModelConfig(**model_fields(hf), layers=tuple(LayerSpec(kind, *layer) for layer in layers))
