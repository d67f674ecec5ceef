"""Putting adapters on a decoder and telling its trainable state from the frozen one."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora import LoRA, LoraConfig, Target, resolve_targets
from qlora_jax.lora.delta import AdapterScale
from qlora_jax.lora.init import init_pair
from qlora_jax.models.blocks.layers import Linear
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.table import STACK, hf_name, linear_modules, parameter_specs
from qlora_jax.quant.mixed import MixedStack
from qlora_jax.quant.nf4 import NF4Tensor

# Adapters (or, in a full fine-tune, the weights themselves) are nnx.Param; everything else is frozen.
TRAINABLE = nnx.Param
ADAPTER = nnx.Any(nnx.LoRAParam, AdapterScale)


def add_adapters(model: Decoder, config: LoraConfig, key: jax.Array, dtype=jnp.float32) -> dict[str, Target]:
    """Gives the targeted layers of `model` their A and B, in place.

    Returns:
      The adapted modules by Hugging Face path, with rank and scale.

    Raises:
      ValueError: a target that matches nothing.
    """
    targets = resolve_targets(config, linear_modules(model.config))
    for path, linear in linears(model):
        own = [targets.get(name) for name in module_names(model.config, path)]
        if any(own):
            linear.lora = _adapter(model.config, path, own, config.dropout, key, dtype)
    return targets


def _adapter(config: ModelConfig, path: str, targets: list[Target | None], dropout, key, dtype) -> LoRA:
    out_features, in_features = parameter_specs(config)[f"{path}.weight"].shape
    rank = max(target.rank for target in targets if target)
    pairs = [
        init_pair(key, name, target, rank=rank, in_features=in_features, out_features=out_features, dtype=dtype)
        for name, target in zip(module_names(config, path), targets, strict=True)
    ]
    scale = np.array([target.scale if target else 0.0 for target in targets], np.float32)
    if not path.startswith(STACK):
        return LoRA(*pairs[0], jnp.asarray(scale[0]), dropout)
    return LoRA(jnp.stack([A for A, _ in pairs]), jnp.stack([B for _, B in pairs]), jnp.asarray(scale), dropout)


def linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """Every linear layer of a decoder with its path."""
    for path, node in nnx.iter_modules(model):
        if isinstance(node, Linear):
            yield ".".join(map(str, path)), node


def packed_projection(model: Decoder) -> NF4Tensor | None:
    """One of a decoder's packed stacks, which are packed alike; None where nothing is."""
    values = [linear.weight.get_value() for path, linear in linears(model) if path.startswith(STACK)]
    stacks = [value.packed if isinstance(value, MixedStack) else value for value in values]
    return next((stack for stack in stacks if isinstance(stack, NF4Tensor)), None)


def module_names(config: ModelConfig, path: str) -> list[str]:
    """The Hugging Face module path of each layer of a stack, or the only one of a single module."""
    if path.startswith(STACK):
        return [hf_name(path, layer) for layer in range(config.num_layers)]
    return [hf_name(path)]


def adapter_count(config: ModelConfig, targets: dict[str, Target]) -> int:
    """Trainable parameters of the given targets, without the zeros that pad unequal ranks."""
    specs = parameter_specs(config)
    shapes = {
        name: specs[f"{path}.weight"].shape for path in _linear_paths(config) for name in module_names(config, path)
    }
    return sum(target.rank * sum(shapes[name]) for name, target in targets.items())


def _linear_paths(config: ModelConfig) -> list[str]:
    paths = [path for path, spec in parameter_specs(config).items() if spec.projection]
    return [p.removesuffix(".weight") for p in paths] + ([] if config.tie_embeddings else ["lm_head"])
