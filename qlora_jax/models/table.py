"""The table of a decoder's parameters: the one place where paths, shapes, axes and checkpoint names meet.

Loading, checks, random weights, planning, export, adapters' names, saving and abstract shapes all read it.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_jax.models.blocks.block import BlockPart, Leaf, leaves_of
from qlora_jax.models.blocks.layer import layer_parts
from qlora_jax.models.blocks.per_layer import LayerInputs
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Axis, Param, Part, Piece, Tensor
from qlora_jax.models.segments import stacks
from qlora_jax.quant.packed import EXPERT, LAYER


@functools.lru_cache(maxsize=64)
def table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter by its path in our model."""
    decoder = config.names.decoder
    # Inputs of layers are a module of ours, and three of transformers'.
    found = [
        _param(config, path, leaf, f"{decoder}.{path.removeprefix('per_layer.')}")
        for path, leaf in _outside(config).items()
    ]
    if not config.tie_embeddings:
        found.append(_param(config, "lm_head.weight", _rows(config, "head"), "lm_head.weight"))
    for stack in stacks(config):
        layers = (Axis(LAYER, stack.layers),)
        for path, leaf in leaves_of(layer_parts(config, stack.kind)).items():
            name = f"{decoder}.layers.{{layer}}.{config.names.module(path)}"
            found.append(_param(config, f"{stack.name}.{path}", leaf, name, layers))
    return {param.path: param for param in found}


def _outside(config: ModelConfig) -> dict[str, Leaf]:
    """The parameters outside the layers, but for the output layer."""
    D = config.hidden_size
    found = {
        "embed_tokens.weight": _rows(config, "embedding"),
        "norm.weight": Leaf((D,), ("embed",), "norm", 1 - (config.final_norm or config.norm).offset),
    }
    if config.per_layer is not None:
        found |= leaves_of({"per_layer": BlockPart(LayerInputs, config.per_layer, config)})
    return found


def _rows(config: ModelConfig, role: Any) -> Leaf:
    return Leaf((config.vocab_size, config.hidden_size), ("vocab", "embed"), role)


def _param(config: ModelConfig, path: str, leaf: Leaf, name: str, layers: tuple[Axis, ...] = ()) -> Param:
    """`name`: of the parameter in transformers; pieces of its own are named as seen from its layer."""
    layer = f"{config.names.decoder}.layers.{{layer}}." if layers else ""
    own = [(dataclasses.replace(piece, name=f"{layer}{config.names.module(piece.name)}")) for piece in leaf.pieces]
    pieces = [dataclasses.replace(piece, name=config.names.file(piece.name)) for piece in own or [Piece(name)]]
    return Param(
        path=path,
        shape=leaf.shape,
        axes=leaf.axes,
        role=leaf.role,
        name=name,
        start=leaf.start,
        dtype=leaf.dtype,
        stacked=layers + ((Axis(EXPERT, range(leaf.experts)),) if leaf.experts else ()),
        pieces=tuple(pieces),
    )


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every array of every parameter: the only loop over paths, layers and names."""
    for param in table(config).values():
        yield from param.tensors()


def checkpoint(config: ModelConfig) -> dict[str, list[Part]]:
    """Every tensor of a checkpoint by its name, with the parts of arrays that it holds; several where it fuses them."""
    found: dict[str, list[Part]] = collections.defaultdict(list)
    for tensor in tensors(config):
        for part in tensor.parts:
            found[part.name].append(part)
    return dict(found)


def joined(parts: list[Part], values: list[np.ndarray]) -> np.ndarray:
    """A checkpoint's tensor from the values of its parts."""
    if parts[0].piece.cut is None:
        return values[0]
    whole = np.empty(parts[0].whole, values[0].dtype)
    for part, value in zip(parts, values, strict=True):
        part.of(whole)[...] = value
    return whole


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied embeddings counted once."""
    return sum(math.prod(param.leading) * math.prod(param.shape) for param in table(config).values())


def adaptable(config: ModelConfig) -> dict[str, Param]:
    """The weights that an adapter can go to, by the paths of their modules in our model."""
    return {p.module: p for p in table(config).values() if p.adaptable}


def linear_modules(config: ModelConfig) -> list[str]:
    """Every module that an adapter can go to, as transformers names them; the decoder's first, layer by layer.

    These are linear layers, and of a mixture the two projections of all a layer's experts.
    """
    last = [config.num_layers]
    found = [pair for p in adaptable(config).values() for pair in zip(p.layers or last, p.modules, strict=True)]
    return [module for _, module in sorted(found, key=lambda pair: pair[0])]
