"""One view over a folder's safetensors files, single or sharded, read a tensor at a time."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax.io.foreign import other_weights
from qlora_jax.io.json_object import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "U8": np.uint8,
    # Packed codes are bytes whatever their file calls them (bnb_4bit_quant_storage).
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}


class TensorFolder:
    """The tensors of a Hugging Face checkpoint folder, memory-mapped.

    Raises:
      FileNotFoundError: no safetensors files, or a shard that the index names is absent.
      ValueError: a file that is truncated or no safetensors, a tensor that the index or a caller names is absent.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._stored_as: dict[str, str] = {}
        self.copies: set[str] = set()  # names that stand for what has another one
        self._file_of = self._locate()

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's safetensors dtype, such as "BF16", from the header alone."""
        return self._slice(name).get_dtype()

    def nbytes(self, name: str) -> int:
        """A tensor's size in bytes, from the header alone."""
        return math.prod(self.shape(name)) * np.dtype(DTYPES.get(self.dtype(name), np.uint8)).itemsize

    def read(self, name: str) -> np.ndarray:
        """A tensor's values; BF16 as ml_dtypes.bfloat16."""
        dtype = self.dtype(name)
        if dtype not in DTYPES:
            raise ValueError(f"{self.file(name)}: tensor {name!r} is {dtype}, expected one of {', '.join(DTYPES)}")
        return self._open(self._file_of[name]).get_tensor(self._stored_as.get(name, name)).view(DTYPES[dtype])

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder} holds no tensor {name!r}")
        return self.folder / self._file_of[name]

    def rename(self, stored: str, name: str) -> None:
        """Lets a tensor be known as `name` instead of as its file says."""
        self._file_of[name] = self._file_of.pop(stored)
        self._stored_as[name] = stored

    def copy(self, stored: str, name: str) -> None:
        """Lets a tensor be known as `name`, too."""
        self._file_of[name], self._stored_as[name] = self._file_of[stored], self._stored_as.get(stored, stored)
        self.copies.add(name)

    def parts(self, name: str) -> list[str]:
        """The tensors that belong to a packed weight beside its codes: those named `name.…`."""
        return sorted(other for other in self._file_of if other.startswith(f"{name}."))

    def _locate(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            return self._locate_shards()
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise FileNotFoundError(_nothing_to_read(self.folder))

    def _locate_shards(self) -> dict[str, str]:
        file_of = read_object(self.folder / INDEX).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise ValueError(f"{self.folder / INDEX} is no index of shards (weight_map): download it again")
        for file in sorted(set(file_of.values())):
            if not (self.folder / file).exists():
                raise FileNotFoundError(
                    f"{self.folder / INDEX} names {file}, which is not in the folder: download it again"
                )
            absent = {name for name, place in file_of.items() if place == file} - set(self._open(file).keys())
            if absent:
                raise ValueError(
                    f"{self.folder / INDEX} places {sorted(absent)[0]!r} in {file}, which does not hold it"
                )
        return file_of

    def _slice(self, name: str):
        self.file(name)
        return self._open(self._file_of[name]).get_slice(self._stored_as.get(name, name))

    def _open(self, file: str):
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="numpy")
            except SafetensorError as error:
                size = (self.folder / file).stat().st_size
                raise ValueError(
                    f"{self.folder / file} ({size} bytes) is truncated or no safetensors file ({error}): "
                    f"download it again"
                ) from error
        return self._files[file]


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder: give one with a Hugging Face checkpoint (config.json, *.safetensors)"
    return other_weights(folder) or f"{folder} holds neither {SINGLE} nor {INDEX}: download it again"
