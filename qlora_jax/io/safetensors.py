"""One view over a folder's safetensors files, single or sharded, read a tensor at a time."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
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
        self._file_of = self._locate()

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's safetensors dtype, such as "BF16", from the header alone."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """A tensor's values; BF16 as ml_dtypes.bfloat16."""
        dtype = self.dtype(name)
        if dtype not in DTYPES:
            raise ValueError(f"{self.file(name)}: tensor {name!r} is {dtype}, expected one of {', '.join(DTYPES)}")
        return self._open(self._file_of[name]).get_tensor(name).view(DTYPES[dtype])

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder} holds no tensor {name!r}")
        return self.folder / self._file_of[name]

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
        try:
            file_of = json.loads((self.folder / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.folder / INDEX} is no index of shards ({error!r}): download it again") from error
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
        return self._open(self._file_of[name]).get_slice(name)

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
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return f"{folder} holds pickled PyTorch weights only: convert them to safetensors first (save_pretrained does)"
    return f"{folder} holds neither {SINGLE} nor {INDEX}"
