"""What an adapter is: the protocol behind which LoRA stands, and its variants."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.lora.targets import Target


class AdapterScale(nnx.Variable):
    """The factor on the update of every layer of a stack: fixed, but part of the adapter."""


class Shape(NamedTuple):
    """Of the adapted modules: outputs N and inputs K, the rank r that they are padded to, and the number of experts.

    `experts` is 0 for a linear layer; a module of experts has outputs and inputs for each of them.
    """

    outputs: int
    inputs: int
    rank: int
    experts: int = 0


class Site(NamedTuple):
    """Where an adapter goes: `weight()` gives the frozen weight, as it is stored, and `dtype` is that of the Parts."""

    weight: Callable[[], Any]
    dtype: Any


class PeftName(NamedTuple):
    """An array's name below its module, which ends in `ending`, and how many axes it has."""

    stem: str
    ending: str
    axes: int


class Adapter(nnx.Module, abc.ABC):
    """What is trained beside the frozen weights of a module, or of a stack of them.

    It owns its arrays and their start, how it is merged into a weight, and its arrays' names in PEFT's files; what it
    makes of the module's input and product is its kind's: LinearAdapter or ExpertAdapter.
    """

    # A NamedTuple class with one adapted module's arrays, A and B among them, and their names in PEFT's files.
    Parts: ClassVar[Any]
    NAMES: ClassVar[dict[str, PeftName]]

    @classmethod
    @abc.abstractmethod
    def start(cls, key: Array, name: str, target: Target | None, shape: Shape, site: Site) -> Any:
        """The untrained Parts of a module, padded to `shape.rank`; all zeros where it has no target."""

    @classmethod
    @abc.abstractmethod
    def of(cls, parts: Any, scale: Any, dropout: float) -> Self:
        """The adapter of Parts, of one module or of a stack."""

    @classmethod
    @abc.abstractmethod
    def stacked(cls, parts: list[Any], shape: Shape, dtype: Any) -> Any:
        """Parts `[L, …]` in NumPy of the layers' own, padded to `shape.rank`; None is a layer without an adapter."""

    @classmethod
    @abc.abstractmethod
    def check_shapes(cls, parts: Any, shape: Shape) -> tuple[str, tuple, tuple] | None:
        """(name, shape, expected shape) of the first array that does not fit a module; None where all do."""

    @classmethod
    @abc.abstractmethod
    def size(cls, shape: Shape) -> int:
        """Trainable parameters of one module."""

    @classmethod
    @abc.abstractmethod
    def merge(
        cls, weight: np.ndarray, parts: Any, scale: float, rows: slice = slice(None), expert: int = 0
    ) -> np.ndarray:
        """Some rows of the weight `[N, K]`, or of one expert's, with the adapter in them: added in float32, cast once.

        Args:
          weight: these rows.
        """

    @abc.abstractmethod
    def parts(self, layer: int | None, rank: int) -> Any:
        """One module's Parts in NumPy, without the padding beyond its rank. `layer`: None where there is no stack."""


class LinearAdapter(Adapter):
    """Of the layer y = x · Wᵀ + b.

    It is asked twice, because the product with the frozen weight stands between: `made = adapter(x, key)`, then
    `adapter.apply(y, made, weight, bias)`.
    """

    @abc.abstractmethod
    def outputs(self, start: int | Int[Array, ""], size: int) -> Self:
        """The adapter of `size` outputs of a single layer, from `start` on, which may be traced."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*B K"], key: Array | None = None) -> Any:
        """What depends on x alone. `key` turns dropout on."""

    @abc.abstractmethod
    def apply(self, y: Float[Array, "*B N"], made: Any, weight: Any, bias: jax.Array | None) -> Float[Array, "*B N"]:
        """The adapted layer's output, of its plain output y and of what `__call__` made; `weight` as it is stored."""


class ExpertAdapter(Adapter):
    """Of the experts of a mixture: y = x · W[e]ᵀ + b[e] on tiles of rows of one expert e each. It has no dropout."""

    @abc.abstractmethod
    def route(self, index: Int[Array, "T k"], base: Any, rows: int) -> Any:
        """How the adapter wants the pairs of a token and an expert sorted.

        Args:
          index: each token's experts; the tokens are those of `rows` rows of the batch, one row after the other.
          base: the Routing of the frozen weights.
        """

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "tiles side K"], routing: Any) -> Float[Array, "tiles side N"]:
        """The update of the base's tiles; `routing` is what `route` gave."""
