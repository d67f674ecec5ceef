"""What a block is: a part of a layer that declares its own parameters and is built from their values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx

from qlora_jax.models.blocks.embedding import Embedding
from qlora_jax.models.blocks.linear import Linear
from qlora_jax.models.blocks.norm import RMSNorm
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.params import Piece, Role
from qlora_jax.models.specs import NormSpec


class Leaf(NamedTuple):
    """One parameter of a block.

    Attributes:
      shape, axes: of the array, and what each of its axes counts; with `experts`, of one expert's.
      role: what it is for.
      start: what an untrained one is filled with; None where it is drawn.
      experts: how many experts have one each; 0 where it is no expert's.
      pieces: the checkpoint's tensors that it is made of, named from its layer; none where it is one tensor of its own
        path.
      dtype: of its values, whatever the model's; empty for the model's.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    start: float | None = None
    experts: int = 0
    pieces: tuple[Piece, ...] = ()
    dtype: str = ""


@runtime_checkable
class Part(Protocol):
    """What a block is made of: it has parameters, by their paths below its own, and becomes a module of their values.

    The paths are those of Hugging Face checkpoints, and stand here alone.
    """

    def leaves(self) -> dict[str, Leaf]: ...

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LinearPart:
    """A linear layer of `outputs` and `inputs`; `axes` names what these count."""

    outputs: int
    inputs: int
    axes: tuple[str, str]
    bias: bool = False
    role: Role = "projection"

    def leaves(self) -> dict[str, Leaf]:
        found = {"weight": Leaf((self.outputs, self.inputs), self.axes, self.role)}
        return found | ({"bias": Leaf((self.outputs,), self.axes[:1], "bias", 0.0)} if self.bias else {})

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Linear:
        return Linear(values["weight"], values.get("bias"), kind=kind)


@dataclasses.dataclass(frozen=True)
class EmbeddingPart:
    """A table of `size` rows."""

    size: int
    width: int
    axes: tuple[str, str]

    def leaves(self) -> dict[str, Leaf]:
        return {"weight": Leaf((self.size, self.width), self.axes, "embedding")}

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Embedding:
        return Embedding(values["weight"], kind=kind)


@dataclasses.dataclass(frozen=True)
class NormPart:
    """A normalisation over `size` elements."""

    size: int
    spec: NormSpec
    axis: str = "embed"

    def leaves(self) -> dict[str, Leaf]:
        return {"weight": Leaf((self.size,), (self.axis,), "norm", 1 - self.spec.offset)}

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> RMSNorm:
        return RMSNorm(values["weight"], self.spec, kind=kind)


@dataclasses.dataclass(frozen=True)
class ArrayPart:
    """An array that stands for itself, such as a head's sinks; `start` and `dtype` as Leaf has them."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    start: float | None = None
    dtype: str = ""

    def leaves(self) -> dict[str, Leaf]:
        return {"": Leaf(self.shape, self.axes, "array", self.start, dtype=self.dtype)}

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> nnx.Variable:
        return kind(values[""])


class Block(nnx.Module):
    """A module that is put together from its parts, each an attribute by its name in checkpoints.

    Attributes:
      spec: what the family says of it; `spec.name` is where in a layer its parameters lie.
    """

    @classmethod
    def parts(cls, spec: Any, config: ModelConfig) -> dict[str, Part | None]:
        """What a block of this model consists of; None for what its family leaves out."""
        raise NotImplementedError

    def __init__(self, spec: Any, config: ModelConfig, values: Mapping[str, Any], kind: type[nnx.Variable]):
        self.spec = spec
        for name, part in self.parts(spec, config).items():
            setattr(self, name, None if part is None else part.build(below(values, name), kind))


@dataclasses.dataclass(frozen=True)
class BlockPart:
    """A block as a part of a larger one."""

    block: type[Block]
    spec: Any
    config: ModelConfig

    def leaves(self) -> dict[str, Leaf]:
        return leaves_of(self.block.parts(self.spec, self.config))

    def build(self, values: Mapping[str, Any], kind: type[nnx.Variable]) -> Block:
        return self.block(self.spec, self.config, values, kind)


def leaves_of(parts: Mapping[str, Part | None]) -> dict[str, Leaf]:
    """The parameters of several parts by their paths."""
    return {
        f"{name}.{path}".removesuffix("."): leaf
        for name, part in parts.items()
        if part is not None
        for path, leaf in part.leaves().items()
    }


def below(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values whose paths lie below `name`; the one at `name` itself has the empty path."""
    return {
        path[len(name) + 1 :]: value for path, value in values.items() if path == name or path.startswith(f"{name}.")
    }
