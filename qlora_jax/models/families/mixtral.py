"""Mixtral: Mistral with eight experts in place of the MLP."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.common import attention, mixture, model_fields, rope
from qlora_jax.models.names import Names
from qlora_jax.models.specs import LayerKind, LayerSpec, RouterSpec

# Checkpoints have the names of Mistral AI's own code.
FILES = ((".mlp.experts.", ".block_sparse_moe.experts."), (".mlp.gate.", ".block_sparse_moe.gate."))


def from_hf(hf) -> ModelConfig:
    """The decoder's configuration from transformers' MixtralConfig."""
    sizes = dict(experts=hf.num_local_experts, inner=hf.intermediate_size, each=("w1", "w3", "w2"))
    kind = LayerKind(attention(hf), mixture(hf, router=RouterSpec(), **sizes))
    layer = LayerSpec(kind, hf.sliding_window or 0, rope(hf))
    return ModelConfig(**model_fields(hf), layers=(layer,) * hf.num_hidden_layers, names=Names(files=FILES))
