"""A decoder's parameter: an array or a stack of them, and the parts of checkpoints' tensors that it is made of."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from qlora_jax.quant.packed import EXPERT, LAYER

# What a parameter is for: projections and experts are packed and adapted, gates (linear layers of few outputs) are
# adapted but never packed; of the others each has rules of its own.
Role = Literal["embedding", "head", "projection", "expert", "gate", "bias", "norm", "array"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A leading axis of a stack, LAYER or EXPERT, and the numbers along it in a checkpoint."""

    name: str
    numbers: range


@dataclasses.dataclass(frozen=True)
class Cut:
    """The part of a checkpoint's tensor that an array is, where the tensor holds those of all experts.

    Attributes:
      whole: shape of the checkpoint's tensor, whose first axis counts experts.
      transposed: whether it keeps `[in, out]`.
    """

    whole: tuple[int, ...]
    transposed: bool = False

    def of(self, tensor: Any, expert: int) -> Any:
        """A view of the part, as `[out, …]`; NumPy writes through it. Of a packed tensor one expert's matrix."""
        part = tensor[expert]
        return part.swapaxes(0, 1) if self.transposed and isinstance(part, np.ndarray) else part


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one tensor of a checkpoint gives to an array.

    Attributes:
      name: of the tensor, with `{layer}` and `{expert}` where there is one for each.
      rows: which rows of the array it is, start and stop; None for all of them.
      cut: which part of the tensor; None for all of it.
    """

    name: str
    rows: tuple[int, int] | None = None
    cut: Cut | None = None

    def shape(self, array: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, for an array of this one."""
        if self.cut is not None:
            return self.cut.whole
        return array if self.rows is None else (self.rows[1] - self.rows[0], *array[1:])

    def of(self, tensor: Any, expert: int = 0) -> Any:
        """A view of the tensor that is these rows of the array; NumPy writes through it."""
        return tensor if self.cut is None else self.cut.of(tensor, expert)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a decoder: an array, or a stack of arrays.

    Attributes:
      path: in our model.
      shape: of one array.
      axes: what each axis of `shape` counts: "vocab", "embed", "mlp", "heads", "kv_heads", "head", "kernel"
        (tokens that a convolution sees), "one".
      start: what an untrained array is filled with; None where it is drawn.
      dtype: of its values, whatever the model's; empty for the model's.
      name: in transformers, with `{layer}` where there is one for each.
      stacked: the leading axes of the stack, from the outside in.
      pieces: the tensors of a checkpoint that an array is put together from, one below the other.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    name: str
    start: float | None = None
    dtype: str = ""
    stacked: tuple[Axis, ...] = ()
    pieces: tuple[Piece, ...]

    @property
    def projection(self) -> bool:
        """Whether it is a decoder projection, which is packed and adapted as such."""
        return self.role in ("projection", "expert")

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix that can be packed."""
        return self.projection or self.role in ("embedding", "head")

    @property
    def adaptable(self) -> bool:
        """Whether it is the weight of a linear layer, which an adapter can go to."""
        return self.projection or self.role in ("head", "gate")

    @property
    def module(self) -> str:
        """The path of the module that it is the weight or bias of."""
        return self.path.rpartition(".")[0]

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the stack's leading axes."""
        return tuple(len(axis.numbers) for axis in self.stacked)

    @property
    def experts(self) -> int:
        """How many experts have an array each; 0 where it is no expert's."""
        return next((len(axis.numbers) for axis in self.stacked if axis.name == EXPERT), 0)

    @property
    def layers(self) -> range:
        """The layers whose arrays it stacks; empty for what stands outside the layers."""
        return next((axis.numbers for axis in self.stacked if axis.name == LAYER), range(0))

    @property
    def modules(self) -> list[str]:
        """The modules in transformers whose weight or bias it is, layer by layer; a layer's experts are one."""
        sizes = (1 if axis.name == EXPERT else len(axis.numbers) for axis in self.stacked)
        return [Tensor(self, place).module for place in itertools.product(*map(range, sizes))]

    def tensors(self) -> Iterator["Tensor"]:
        """Its arrays, in the order of the stack."""
        for place in itertools.product(*map(range, self.leading)):
            yield Tensor(self, place)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a parameter, at a place of its stack."""

    param: Param
    place: tuple[int, ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Its layer, and expert, in the checkpoint."""
        return {axis.name: axis.numbers[i] for axis, i in zip(self.param.stacked, self.place, strict=True)}

    @property
    def name(self) -> str:
        """What transformers calls it."""
        return self.param.name.format(**self.numbers)

    @property
    def module(self) -> str:
        """The module in transformers whose weight or bias it is."""
        return self.name.rpartition(".")[0]

    @property
    def parts(self) -> list["Part"]:
        """What the checkpoint's tensors give to it."""
        return [Part(self, piece) for piece in self.param.pieces]

    def gathered(self, read: Callable[["Part"], Any]) -> Any:
        """The array, of what `read` gives for each part."""
        values = [read(part) for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one tensor of a checkpoint gives to an array."""

    tensor: Tensor
    piece: Piece

    @property
    def name(self) -> str:
        """The checkpoint's tensor."""
        return self.piece.name.format(**self.tensor.numbers)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        return self.piece.shape(self.tensor.param.shape)

    @property
    def rows(self) -> slice:
        """Its rows of the array."""
        return slice(*(self.piece.rows or (None,)))

    def of(self, tensor: Any) -> Any:
        """A view of the checkpoint's tensor that is this part; NumPy writes through it."""
        return self.piece.of(tensor, self.tensor.numbers.get(EXPERT, 0))
