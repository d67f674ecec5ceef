"""What a block is: a part of a layer that declares its own parameters and is built from their values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from flax import nnx

from qlora_jax.models.blocks.linear import Linear
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.config import ModelConfig

# What a parameter is for: a projection is packed and adapted, of the others each has rules of its own.
Role = Literal["embedding", "head", "projection", "bias", "norm"]


class Leaf(NamedTuple):
    """One parameter of a block: its shape, what each of its axes counts, and what it is for."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role


@runtime_checkable
class Part(Protocol):
    """What a block is made of: it has parameters, by their paths below its own, and becomes a module of their values.

    The paths are those of Hugging Face checkpoints, and stand here alone.
    """

    def leaves(self) -> dict[str, Leaf]: ...

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True)
class LinearPart:
    """A linear layer of `outputs` and `inputs`; `axes` names what these count."""

    outputs: int
    inputs: int
    axes: tuple[str, str]
    bias: bool = False

    def leaves(self) -> dict[str, Leaf]:
        found = {"weight": Leaf((self.outputs, self.inputs), self.axes, "projection")}
        return found | ({"bias": Leaf((self.outputs,), self.axes[:1], "bias")} if self.bias else {})

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Linear:
        return Linear(values["weight"], values.get("bias"), kind=kind)


@dataclasses.dataclass(frozen=True)
class NormPart:
    """A normalisation over `size` elements."""

    size: int
    eps: float
    axis: str = "embed"

    def leaves(self) -> dict[str, Leaf]:
        return {"weight": Leaf((self.size,), (self.axis,), "norm")}

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> RMSNorm:
        return RMSNorm(values["weight"], eps=self.eps, kind=kind)


class Block(nnx.Module):
    """A module that is put together from its parts, each an attribute by its name in checkpoints."""

    # Where in a layer the block's parameters lie in checkpoints.
    NAME: ClassVar[str]

    @classmethod
    def parts(cls, config: ModelConfig) -> dict[str, Part | None]:
        """What a block of this model consists of; None for what its family leaves out."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, values: Mapping[str, Any], kind: type[nnx.Variable]):
        self.config = config
        for name, part in self.parts(config).items():
            setattr(self, name, None if part is None else part.build(below(values, name), kind))


@dataclasses.dataclass(frozen=True)
class BlockPart:
    """A block as a part of a larger one."""

    block: type[Block]
    config: ModelConfig

    def leaves(self) -> dict[str, Leaf]:
        return leaves_of(self.block.parts(self.config))

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Block:
        return self.block(self.config, values, kind)


def leaves_of(parts: Mapping[str, Part | None]) -> dict[str, Leaf]:
    """The parameters of several parts by their paths."""
    return {
        f"{name}.{path}": leaf
        for name, part in parts.items()
        if part is not None
        for path, leaf in part.leaves().items()
    }


def below(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values whose paths lie below `name`."""
    return {path.removeprefix(f"{name}."): value for path, value in values.items() if path.startswith(f"{name}.")}
