"""Inputs that each layer has of its own (Gemma's small models): made of the tokens once, added in every layer."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.models.blocks.activations import ACTIVATIONS
from qlora_jax.models.blocks.block import Block, EmbeddingPart, LinearPart, NormPart, Part
from qlora_jax.models.blocks.embedding import Embedding
from qlora_jax.models.blocks.linear import Linear, subkey
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.config import ModelConfig, PerLayerInputs

NORM = "post_per_layer_input_norm"


def layer_input_parts(size: int, config: ModelConfig) -> dict[str, Part]:
    """What a layer has for its own inputs of `size` elements, by names in checkpoints."""
    D = config.hidden_size
    return {
        "per_layer_input_gate": LinearPart(size, D, ("mlp", "embed")),
        "per_layer_projection": LinearPart(D, size, ("embed", "mlp")),
        NORM: NormPart(D, config.norm),
    }


def layer_input_update(layer: Any, x: Float[Array, "B T D"], own: Float[Array, "B T P"], key) -> Float[Array, "B T D"]:
    """norm(projection(gelu(gate(x)) · own)), which the layer adds to x."""
    gate = layer.per_layer_input_gate(x, subkey(key, "per_layer_gate"))
    gated = ACTIVATIONS["gelu_pytorch_tanh"](gate) * own.astype(x.dtype)
    return getattr(layer, NORM)(layer.per_layer_projection(gated, subkey(key, "per_layer")))


class LayerInputs(Block):
    """The inputs of all layers: (norm(projection(x)/√D) + table[token]·√P) / √2."""

    spec: PerLayerInputs
    embed_tokens_per_layer: Embedding
    per_layer_model_projection: Linear
    per_layer_projection_norm: RMSNorm

    @classmethod
    def parts(cls, spec: PerLayerInputs, config: ModelConfig) -> dict[str, Part | None]:
        width = config.num_layers * spec.size
        return {
            "embed_tokens_per_layer": EmbeddingPart(spec.vocab, width, ("vocab", "layers")),
            "per_layer_model_projection": LinearPart(width, config.hidden_size, ("layers", "embed"), role="gate"),
            "per_layer_projection_norm": NormPart(spec.size, config.norm, "layers"),
        }

    def __call__(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"], key=None) -> Float[Array, "L B T P"]:
        shape = (*tokens.shape, -1, self.spec.size)
        # As transformers does, factors are rounded to the dtype that they multiply.
        named = self.embed_tokens_per_layer(tokens).reshape(shape).astype(x.dtype)
        named *= jnp.asarray(self.spec.size**0.5, x.dtype)
        seen = self.per_layer_model_projection(x, subkey(key, "per_layer_model"))
        seen = self.per_layer_projection_norm((seen * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)).reshape(shape))
        return jnp.moveaxis((seen + named) * jnp.asarray(2**-0.5, x.dtype), 2, 0)
