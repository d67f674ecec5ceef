"""Granite: Llama with multipliers on embeddings, scores, residuals and logits; some have windows and sinks."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, by_layer, mlp, model_fields, positive, rope, windows
from qlora_jax.models.specs import LayerKind, LayerSpec, MLPSpec, Rope


def granite_fields(hf) -> dict:
    """What all Granite models share."""
    return model_fields(hf) | dict(
        embedding_multiplier=hf.embedding_multiplier,
        residual_multiplier=hf.residual_multiplier,
        logit_multiplier=1 / positive(hf, "logits_scaling"),
    )


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' GraniteConfig, GraniteSWAConfig or GraniteMoeHybridConfig.

    Raises:
      NotImplementedError: a hybrid's Mamba layers or experts.
    """
    swa = hf.model_type == "granite_swa"
    bias = hf.attention_bias
    mixer = attention(hf, scale=hf.attention_multiplier, qkv_bias=bias, output_bias=bias, sinks=swa)
    if hf.model_type == "granitemoehybrid":
        feed_forward = _hybrid_mlp(hf)
    else:
        feed_forward = mlp(hf, bias=getattr(hf, "mlp_bias", False))
    kind, sliding = LayerKind(mixer, feed_forward), windows(hf) if swa else [0] * hf.num_hidden_layers
    return ModelConfig(
        **granite_fields(hf), layers=tuple(LayerSpec(kind, *layer) for layer in zip(sliding, _ropes(hf), strict=True))
    )


def _hybrid_mlp(hf) -> MLPSpec:
    """Granite 4's, of its models without Mamba layers and experts."""
    others = sorted(set(hf.layers_block_type) - {"full_attention", "attention"})
    if others or hf.num_local_experts:
        found = f"layers of {', '.join(others)} (Mamba)" if others else f"num_local_experts={hf.num_local_experts}"
        raise NotImplementedError(f"granitemoehybrid: {found} are not supported, only attention with dense MLPs")
    names = ("input_linear", "input_linear", "output_linear")
    return mlp(hf, inner=hf.shared_intermediate_size, fused=True, names=names, name="shared_mlp")


def _ropes(hf) -> list[Rope | None]:
    """Each layer's rotation: of models with windows some layers have none, of hybrids perhaps no layer has one."""
    if hf.model_type == "granite_swa":
        thetas = by_layer(hf, "layer_rope_theta")
        turned = [rope(hf, {**hf.rope_parameters, "rope_theta": theta or 1.0}) for theta in thetas]
        return [one if theta else one.still for one, theta in zip(turned, thetas, strict=True)]
    positions = getattr(hf, "position_embedding_type", "rope")
    return [rope(hf) if positions == "rope" else None] * hf.num_hidden_layers
