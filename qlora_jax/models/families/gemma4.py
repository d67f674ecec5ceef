"""Gemma 4, text: heads, keys and rotations differ by the kind of layer; small ones have inputs of each layer's own."""

from qlora_jax.models.config import ModelConfig, PerLayerInputs
from qlora_jax.models.families.common import attention, mixture, mlp, rope, windows
from qlora_jax.models.families.gemma2 import gemma_fields
from qlora_jax.models.names import Names
from qlora_jax.models.specs import (
    SANDWICH_NORMS,
    BesideSpec,
    FeedForwardSpec,
    LayerKind,
    LayerSpec,
    NormSpec,
    RouterSpec,
)

# What stands beside one another in a layer there is one block here.
NAMES = Names(modules=(("beside.", ""),), experts="fused")


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' Gemma4TextConfig or Gemma4UnifiedTextConfig."""
    norm = NormSpec(eps=hf.rms_norm_eps, wide=True)
    size = getattr(hf, "hidden_size_per_layer_input", 0)
    if size < 0:
        raise ValueError(f"hidden_size_per_layer_input is {size}, expected a number from 0 on")
    own = PerLayerInputs(size=size, vocab=hf.vocab_size_per_layer_input) if size else None
    layers = tuple(_layer(hf, layer, window, size) for layer, window in enumerate(windows(hf)))
    return ModelConfig(**gemma_fields(hf) | dict(norm=norm, per_layer=own, names=NAMES), layers=layers)


def _layer(hf, layer: int, window: int, own_inputs: int) -> LayerSpec:
    one, kinds = hf.per_layer_config[layer], hf.layer_types
    first = hf.num_hidden_layers - getattr(hf, "num_kv_shared_layers", 0)
    lenders = [i for i in range(first) if kinds[i] == kinds[layer]]
    if layer >= first and not lenders:
        raise ValueError(f"num_kv_shared_layers is {hf.num_kv_shared_layers}: no {kinds[layer]} layer is left to lend")
    source = None if layer < first else lenders[-1]
    mixer = attention(
        one,
        scale=1.0,
        qk_norm="head",
        value_norm=True,
        keys_are_values=getattr(hf, "attention_k_eq_v", True) and not window,
        borrows=source is not None,
    )
    wide = mixer.borrows and getattr(hf, "use_double_wide_mlp", False)
    dense = mlp(one, inner=one.intermediate_size * (2 if wide else 1))
    feed_forward: FeedForwardSpec = dense
    norms = SANDWICH_NORMS
    if getattr(hf, "enable_moe_block", False):
        router = RouterSpec(name="router")
        experts = mixture(hf, top_k=hf.top_k_experts, router=router, name="beside")
        feed_forward, norms = BesideSpec(mlp=dense, moe=experts), norms._replace(before_feed_forward=None)
    kind = LayerKind(mixer, feed_forward, norms, own_inputs, True, source)
    return LayerSpec(kind, window, rope(one, hf.rope_parameters[kinds[layer]]))
