"""LFM2: short convolutions between gates, and attention in some layers; the mixtures among them have experts."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, model_fields, rope
from qlora_jax.models.names import Names
from qlora_jax.models.specs import (
    ConvSpec,
    FeedForwardSpec,
    LayerKind,
    LayerNorms,
    LayerSpec,
    MLPSpec,
    MoESpec,
    RouterSpec,
)

NORMS = LayerNorms(before_mixer="operator_norm", before_feed_forward="ffn_norm")
# The router's correction stands beside it.
NAMES = Names(modules=((".gate.expert_bias", ".expert_bias"),), files=(("model.norm.", "model.embedding_norm."),))


def layer(hf, kind: str, feed_forward: FeedForwardSpec) -> LayerSpec:
    """A layer of an entry of layer_types. Raises NotImplementedError for another kind."""
    if kind == "conv":
        convolution = ConvSpec(width=hf.hidden_size, kernel=hf.conv_L_cache, bias=hf.conv_bias)
        return LayerSpec(LayerKind(convolution, feed_forward, NORMS))
    if kind != "full_attention":
        raise NotImplementedError(f"layer_types {kind!r} is not supported, only 'conv' and 'full_attention'")
    mixer = attention(hf, output="out_proj", qk_norm="head", norm_names=("q_layernorm", "k_layernorm"))
    return LayerSpec(LayerKind(mixer, feed_forward, NORMS), rope=rope(hf))


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Lfm2Config or Lfm2MoeConfig."""
    sparse, projections = hf.model_type == "lfm2_moe", ("w1", "w3", "w2")
    inner = hf.intermediate_size if sparse else _inner(hf)
    dense = MLPSpec(inner=inner, names=projections, name="feed_forward")
    blocks: list[FeedForwardSpec] = [dense] * hf.num_hidden_layers
    if sparse:
        blocks[hf.num_dense_layers :] = [_experts(hf, projections)] * (hf.num_hidden_layers - hf.num_dense_layers)
    layers = tuple(layer(hf, kind, block) for kind, block in zip(hf.layer_types, blocks, strict=True))
    return ModelConfig(**model_fields(hf), layers=layers, names=NAMES)


def _experts(hf, projections: tuple[str, str, str]) -> MoESpec:
    router = RouterSpec(
        rule="sigmoid",
        renormalize=hf.norm_topk_prob,
        scaling=hf.routed_scaling_factor,
        correction="expert_bias" if hf.use_expert_bias else "",
    )
    return MoESpec(
        experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        inner=hf.moe_intermediate_size,
        router=router,
        each=projections,
        name="feed_forward",
    )


def _inner(hf) -> int:
    """Elements between the projections of the MLP: two thirds of what is stated, times a factor, in whole blocks."""
    if not hf.block_auto_adjust_ff_dim:
        return hf.intermediate_size
    inner = int(hf.block_ffn_dim_multiplier * int(2 * hf.intermediate_size / 3))
    return -(-inner // hf.block_multiple_of) * hf.block_multiple_of
