"""Putting adapters on a decoder and telling its trainable state from the frozen one."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import LoraSection
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.lora.adapter import Adapter, AdapterScale, Shape, Site
from qlora_jax.lora.kinds import KINDS
from qlora_jax.models.blocks.linear import Weighted
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.params import Param
from qlora_jax.models.table import adaptable, linear_modules
from qlora_jax.quant.mixed import layer_of, packed_part
from qlora_jax.quant.nf4 import NF4Tensor

# Adapters (or, in a full fine-tune, the weights themselves) are nnx.Param; everything else is frozen.
TRAINABLE = nnx.Param
ADAPTER = nnx.Any(nnx.LoRAParam, AdapterScale)


def add_adapters(model: Decoder, config: LoraSection, key: jax.Array, dtype=jnp.float32) -> dict[str, Target]:
    """Gives the targeted modules of `model` their adapters, untrained, in place.

    Returns:
      The adapted modules by Hugging Face path, with rank and scale.

    Raises:
      ValueError: a target that matches nothing, or dropout on experts.
    """
    targets = resolve_targets(config, linear_modules(model.config))
    for path, linear in linears(model):
        param = adaptable(model.config)[path]
        own = {module: targets.get(module) for module in param.modules}
        if any(own.values()):
            linear.lora = _untrained(config, param, own, key, Site(linear.weight.get_value, dtype))
    return targets


def _untrained(config: LoraSection, param: Param, targets: dict[str, Target | None], key, whole: Site) -> Adapter:
    kind = KINDS[config.variant].of(param.experts)
    shape = shape_of(param, max(target.rank for target in targets.values() if target))
    sites = [whole._replace(weight=_layer(whole, place, bool(param.layers))) for place in range(len(targets))]
    parts = [kind.start(key, *pair, shape, site) for pair, site in zip(targets.items(), sites, strict=True)]
    scale = np.array([target.scale if target else 0.0 for target in targets.values()], np.float32)
    if not param.layers:
        return kind.of(parts[0], scale[0], config.dropout)
    return kind.of(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), scale, config.dropout)


def _layer(whole: Site, place: int, stacked: bool) -> Callable[[], Any]:
    """One layer's weight of a stack's, when it is asked for."""
    return (lambda: layer_of(whole.weight(), place)) if stacked else whole.weight


def shape_of(param: Param, rank: int) -> Shape:
    """What an adapter of a parameter's modules is to fit."""
    outputs, inputs = param.shape
    return Shape(outputs, inputs, rank, param.experts)


def linears(model: Decoder) -> Iterator[tuple[str, Weighted]]:
    """Every linear layer of a decoder, the experts' projections among them, with its path."""
    for path, node in nnx.iter_modules(model):
        if isinstance(node, Weighted):
            yield ".".join(map(str, path)), node


def projections(model: Decoder) -> Iterator[tuple[str, Weighted]]:
    """The linear layers of the layers, each a stack with leading axes, with their paths."""
    params = adaptable(model.config)
    yield from ((path, linear) for path, linear in linears(model) if params[path].projection)


def packed_projection(model: Decoder) -> NF4Tensor | None:
    """One of a decoder's packed stacks, which are packed alike; None where nothing is."""
    parts = (packed_part(linear.weight.get_value()) for _, linear in projections(model))
    return next((part for part in parts if part is not None), None)


def adapter_count(config: ModelConfig, targets: dict[str, Target], variant: str = "lora") -> int:
    """Trainable parameters of the given targets, without what pads unequal ranks. `variant`: a key of KINDS."""
    params = {module: param for param in adaptable(config).values() for module in param.modules}
    found = ((params[name], target.rank) for name, target in targets.items())
    return sum(KINDS[variant].of(param.experts).size(shape_of(param, rank)) for param, rank in found)
