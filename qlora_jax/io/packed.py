"""How checkpoints hold packed weights: the registry of their formats."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qlora_jax.io import bitsandbytes, mxfp4
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.quant.formats import Format
from qlora_jax.quant.packed import Packed


class Form(NamedTuple):
    """How a matrix is packed, and in which dtype it is dequantized."""

    format: Format
    dtype: str


class Reader(Protocol):
    """Of one format: whether a folder holds a weight `name` in it, how, what it was, its values; and the way back.

    Attributes:
      sampled: whether io/sample.py can tell from its codes which values it was packed from.
      experts_only: whether it says nothing of how other weights than experts are to be stored.
    """

    sampled: bool
    experts_only: bool

    def holds(self, tensors: TensorFolder, name: str) -> bool: ...

    def form(self, tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> tuple[Format, str]: ...

    def origin(self, tensors: TensorFolder, name: str) -> tuple[str, tuple[int, ...]]: ...

    def read(self, tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> Packed: ...

    def write(self, name: str, tensor: Any) -> dict[str, np.ndarray]: ...


READERS: tuple[Reader, ...] = (bitsandbytes, mxfp4)


def open_tensors(folder: Path) -> TensorFolder:
    """A checkpoint's tensors, packed ones by the names of their weights. Raises as `TensorFolder`."""
    tensors = TensorFolder(folder)
    mxfp4.name_tensors(tensors)
    return tensors


def reader_of(tensors: TensorFolder, name: str) -> Reader | None:
    """The format in which a folder holds the weight `name`; None where it is not packed."""
    return next((reader for reader in READERS if reader.holds(tensors, name)), None)


def form_of(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> Form | None:
    """How a folder packs the weight `name`; None where it does not. Raises ValueError where it cannot be read."""
    reader = reader_of(tensors, name)
    return None if reader is None else Form(*reader.form(tensors, name, shape))
