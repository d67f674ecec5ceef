"""Muse Glimmer, text: Gemma's norms around blocks, scaleless norms of queries and keys, gates on attention's output."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, head_dim, mlp, model_fields, rope, windows
from qlora_jax.models.specs import SANDWICH_NORMS, LayerKind, LayerSpec, NormSpec


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' MuseGlimmerTextConfig."""
    plain = NormSpec(eps=hf.rms_norm_eps, wide=True)
    scale = hf.qk_scale_factor * head_dim(hf) ** -0.5
    mixer = attention(hf, scale=scale, qk_norm="scaleless", norm=plain, gate="gate_proj")
    kind = LayerKind(mixer, mlp(hf), SANDWICH_NORMS)
    # As in transformers: a layer's theta only says whether it rotates.
    ropes = [rope(hf) if theta else rope(hf).still for theta in hf.layer_rope_theta]
    fields = model_fields(hf) | dict(
        norm=NormSpec(eps=hf.rms_norm_eps, offset=1.0, wide=True),
        after_norm=NormSpec(eps=hf.post_norm_eps, offset=1.0, wide=True),
        final_norm=plain,
        embedding_norm=True,
        logit_multiplier=hf.output_multiplier,
        logit_soft_cap=hf.final_logit_softcapping,
    )
    layers = tuple(LayerSpec(kind, *layer) for layer in zip(windows(hf), ropes, strict=True))
    return ModelConfig(**fields, layers=layers)
