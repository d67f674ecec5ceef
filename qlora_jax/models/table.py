"""The table of a decoder's parameters: loading, planning and random initialization all read it."""

import math
from typing import NamedTuple

from qlora_jax.models.config import ModelConfig

STACK = "layers."


class Spec(NamedTuple):
    """One parameter: the shape it has in a checkpoint (for one layer), and whether it is a decoder projection."""

    shape: tuple[int, ...]
    projection: bool = False


def parameter_specs(config: ModelConfig) -> dict[str, Spec]:
    """Every parameter by its path in our model. A path that begins with "layers." stands for one tensor per layer."""
    D, V = config.hidden_size, config.vocab_size
    specs = {"embed_tokens.weight": Spec((V, D)), "norm.weight": Spec((D,))}
    if not config.tie_embeddings:
        specs["lm_head.weight"] = Spec((V, D))
    for path, spec in _layer_specs(config).items():
        specs[STACK + path] = spec
    return specs


def _layer_specs(config: ModelConfig) -> dict[str, Spec]:
    D, F = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (heads, D, config.qkv_bias),
        "self_attn.k_proj": (kv_heads, D, config.qkv_bias),
        "self_attn.v_proj": (kv_heads, D, config.qkv_bias),
        "self_attn.o_proj": (D, heads, config.output_bias),
        "mlp.gate_proj": (F, D, config.mlp_bias),
        "mlp.up_proj": (F, D, config.mlp_bias),
        "mlp.down_proj": (D, F, config.mlp_bias),
    }
    specs = {"input_layernorm.weight": Spec((D,)), "post_attention_layernorm.weight": Spec((D,))}
    for name, (n, k, bias) in linears.items():
        specs[f"{name}.weight"] = Spec((n, k), projection=True)
        if bias:
            specs[f"{name}.bias"] = Spec((n,))
    if config.qk_norm:
        specs["self_attn.q_norm.weight"] = specs["self_attn.k_norm.weight"] = Spec((config.head_dim,))
    return specs


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied embeddings counted once."""
    return sum(
        math.prod(spec.shape) * (config.num_layers if path.startswith(STACK) else 1)
        for path, spec in parameter_specs(config).items()
    )


def linear_modules(config: ModelConfig) -> list[str]:
    """Paths of every linear layer an adapter can go to, as a Hugging Face model names them."""
    names = [path.removesuffix(".weight") for path, spec in parameter_specs(config).items() if spec.projection]
    stacked = [hf_name(name, layer) for layer in range(config.num_layers) for name in names]
    return stacked + ([] if config.tie_embeddings else ["lm_head"])


def hf_name(path: str, layer: int | None = None) -> str:
    """The Hugging Face name of one of our paths; `layer` says which one of a stack."""
    if path.startswith("lm_head"):
        return path
    if path.startswith(STACK):
        return f"model.layers.{layer}.{path.removeprefix(STACK)}"
    return f"model.{path}"
