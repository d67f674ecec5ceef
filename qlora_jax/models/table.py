"""The table of a decoder's parameters: the one place where paths, shapes, axes and checkpoint names meet.

Loading, checks, random weights, planning, export, adapters' names, saving and abstract shapes all read it.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.models.blocks.block import Leaf, Role, leaves_of
from qlora_jax.models.blocks.layer import layer_parts
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.segments import stacks
from qlora_jax.quant.packed import EXPERT, LAYER

# Where in a checkpoint a decoder lies, and a layer in it.
DECODER, DECODER_LAYER = "model.", "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Axis:
    """A leading axis of a stack, LAYER or EXPERT, and the numbers along it in a checkpoint."""

    name: str
    numbers: range


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of a checkpoint's tensor that a parameter is, where the checkpoint fuses several.

    Attributes:
      whole: shape of the checkpoint's tensor.
      rows: start, stop and step along its outputs.
      by_expert: whether its first axis counts experts.
      transposed: whether it keeps `[in, out]`.
    """

    whole: tuple[int, ...]
    rows: tuple[int, int, int]
    by_expert: bool = False
    transposed: bool = False

    def of(self, tensor: Any, expert: int = 0) -> Any:
        """A view of the part, as `[out, …]`; NumPy writes through it."""
        part = tensor[expert] if self.by_expert else tensor
        return (part.swapaxes(0, 1) if self.transposed else part)[slice(*self.rows)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a decoder: an array, or a stack of arrays.

    Attributes:
      path: in our model.
      shape: of one array.
      axes: what each axis of `shape` counts: "vocab", "embed", "mlp", "heads", "kv_heads", "head".
      name: in a checkpoint, with `{layer}` (and `{expert}`) where there is one tensor for each.
      stacked: the leading axes of the stack, from the outside in.
      cut: which part of the checkpoint's tensor it is; None for all of it.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    name: str
    stacked: tuple[Axis, ...] = ()
    cut: Cut | None = None

    @property
    def projection(self) -> bool:
        """Whether it is a decoder projection, which is packed and adapted as such."""
        return self.role == "projection"

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix, which can be packed and adapted."""
        return self.role not in ("bias", "norm")

    @property
    def module(self) -> str:
        """The path of the module that it is the weight or bias of."""
        return self.path.rpartition(".")[0]

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the stack's leading axes."""
        return tuple(len(axis.numbers) for axis in self.stacked)

    def tensors(self) -> Iterator["Tensor"]:
        """Its arrays, in the order of the stack."""
        for place in itertools.product(*map(range, self.leading)):
            yield Tensor(self, place)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a parameter, at a place of its stack, and where a checkpoint holds it."""

    param: Param
    place: tuple[int, ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Its layer, and expert, in the checkpoint."""
        return {axis.name: axis.numbers[i] for axis, i in zip(self.param.stacked, self.place, strict=True)}

    @property
    def name(self) -> str:
        """The checkpoint's tensor."""
        return self.param.name.format(**self.numbers)

    @property
    def module(self) -> str:
        """The module in the checkpoint whose weight or bias it is."""
        return self.name.rpartition(".")[0]

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        return self.param.shape if self.param.cut is None else self.param.cut.whole

    def part_of(self, tensor: Any) -> Any:
        """A view of the checkpoint's tensor that is this array; NumPy writes through it."""
        return tensor if self.param.cut is None else self.param.cut.of(tensor, self.numbers.get(EXPERT, 0))


@functools.lru_cache(maxsize=64)
def table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter by its path in our model."""
    D, V = config.hidden_size, config.vocab_size
    found = [
        _param("embed_tokens.weight", Leaf((V, D), ("vocab", "embed"), "embedding"), f"{DECODER}embed_tokens.weight"),
        _param("norm.weight", Leaf((D,), ("embed",), "norm"), f"{DECODER}norm.weight"),
    ]
    if not config.tie_embeddings:
        found.append(_param("lm_head.weight", Leaf((V, D), ("vocab", "embed"), "head"), "lm_head.weight"))
    for stack in stacks(config):
        layers = (Axis(LAYER, stack.layers),)
        leaves = leaves_of(layer_parts(config, stack.kind))
        fused = _fused(config, leaves)
        for path, leaf in leaves.items():
            name, cut = fused.get(path, (path, None))
            found.append(_param(f"{stack.name}.{path}", leaf, f"{DECODER_LAYER}{name}", layers, cut))
    return {param.path: param for param in found}


def _param(path: str, leaf: Leaf, name: str, stacked: tuple[Axis, ...] = (), cut: Cut | None = None) -> Param:
    return Param(path=path, shape=leaf.shape, axes=leaf.axes, role=leaf.role, name=name, stacked=stacked, cut=cut)


def _fused(config: ModelConfig, leaves: Mapping[str, Leaf]) -> dict[str, tuple[str, Cut]]:
    """Where the checkpoint's fused layers hold those of `config.fused`: its name and the rows, by their paths."""
    found = {}
    for name, modules in config.fused:
        for ending in ("weight", "bias"):
            paths = [path for path in (f"{module}.{ending}" for module in modules) if path in leaves]
            ends = list(itertools.accumulate(leaves[path].shape[0] for path in paths))
            for path, end in zip(paths, ends, strict=True):
                rows, *rest = leaves[path].shape
                found[path] = f"{name}.{ending}", Cut((ends[-1], *rest), (end - rows, end, 1))
    return found


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every array of every parameter: the only loop over paths, layers and names."""
    for param in table(config).values():
        yield from param.tensors()


def checkpoint(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Every tensor of a checkpoint by its name, with the arrays that it holds; more than one where it fuses several."""
    found: dict[str, list[Tensor]] = collections.defaultdict(list)
    for tensor in tensors(config):
        found[tensor.name].append(tensor)
    return dict(found)


def joined(parts: list[Tensor], values: list[np.ndarray]) -> np.ndarray:
    """A checkpoint's tensor from the values of its arrays."""
    if parts[0].param.cut is None:
        return values[0]
    whole = np.empty(parts[0].whole, values[0].dtype)
    for part, value in zip(parts, values, strict=True):
        part.part_of(whole)[...] = value
    return whole


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied embeddings counted once."""
    return sum(math.prod(param.leading) * math.prod(param.shape) for param in table(config).values())


def adaptable(config: ModelConfig) -> dict[str, Param]:
    """The weights that an adapter can go to, by the paths of their modules in our model."""
    return {p.module: p for p in table(config).values() if p.role in ("projection", "head")}


def linear_modules(config: ModelConfig) -> list[str]:
    """Every linear layer that an adapter can go to, as a checkpoint names them; the decoder's first, layer by layer."""
    found = [tensor for param in adaptable(config).values() for tensor in param.tensors()]
    last = config.num_layers
    return [one.module for one in sorted(found, key=lambda one: one.numbers.get(LAYER, last))]
