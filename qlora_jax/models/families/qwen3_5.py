"""Qwen3.5, text: three layers of gated DeltaNet to one of gated attention."""

from collections.abc import Sequence

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mlp, model_fields, rope
from qlora_jax.models.names import Names
from qlora_jax.models.specs import DeltaSpec, FeedForwardSpec, LayerKind, LayerSpec, MixerSpec, NormSpec, Rope


def hybrid(hf, feed_forwards: Sequence[FeedForwardSpec], *, fused: bool = False) -> ModelConfig:
    """The decoder's configuration with these feed-forward blocks in its layers.

    Args:
      fused: whether DeltaNet's projections are Qwen3-Next's two, or Qwen3.5's four.

    Raises:
      NotImplementedError: another kind of layer.
    """
    norm = NormSpec(eps=hf.rms_norm_eps, offset=1.0, wide=True)
    bias = hf.attention_bias
    full = attention(hf, qkv_bias=bias, output_bias=bias, qk_norm="head", gate="interleaved")
    mixers: dict[str, tuple[MixerSpec, Rope | None]] = {
        "full_attention": (full, rope(hf)),
        "linear_attention": (_delta(hf, fused), None),
    }
    if other := sorted(set(hf.layer_types) - mixers.keys()):
        raise NotImplementedError(f"layer_types {other} are not supported, only {' and '.join(mixers)}")
    layers = []
    for kind, feed_forward in zip(hf.layer_types, feed_forwards, strict=True):
        mixer, turned = mixers[kind]
        layers.append(LayerSpec(LayerKind(mixer, feed_forward), rope=turned))
    # Some checkpoints have a head for several tokens at once.
    return ModelConfig(**model_fields(hf) | dict(norm=norm), layers=tuple(layers), names=Names(passed=("mtp.",)))


def _delta(hf, fused: bool) -> DeltaSpec:
    return DeltaSpec(
        key_heads=hf.linear_num_key_heads,
        value_heads=hf.linear_num_value_heads,
        key_dim=hf.linear_key_head_dim,
        value_dim=hf.linear_value_head_dim,
        kernel=hf.linear_conv_kernel_dim,
        norm=NormSpec(eps=hf.rms_norm_eps),
        activation=hf.hidden_act,
        fused=fused,
    )


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Qwen3_5TextConfig."""
    return hybrid(hf, [mlp(hf)] * hf.num_hidden_layers)
