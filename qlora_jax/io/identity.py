"""Which base a folder holds: a digest of its tensors, or for a quantized copy that of the model it was made from."""

import json
from pathlib import Path

import numpy as np
import xxhash

from qlora_jax.io.safetensors import TensorFolder

RECORD = "qlora_jax.json"


class BaseIdentity:
    """Takes in a folder's tensors as they are read, in any order, and says which base they are.

    The digest covers every tensor's name, dtype, shape and bytes; of a packed weight its scales and maps too.
    """

    def __init__(self, tensors: TensorFolder):
        self._tensors = tensors
        self._digests: dict[str, str] = {}
        record = tensors.folder / RECORD
        self._source = json.loads(record.read_text())["base_hash"] if record.exists() else None

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, taken in."""
        value = self._tensors.read(name)
        self._add(name, value)
        for part in self._tensors.parts(name):
            self._add(part, self._tensors.read(part))
        return value

    def hexdigest(self) -> str:
        """The identity, 32 hexadecimal digits: the recorded source's where the folder is a quantized copy."""
        if self._source is not None:
            return self._source
        listing = "".join(f"{n}:{d}\n" for n, d in sorted(self._digests.items()))
        return xxhash.xxh3_128(listing.encode()).hexdigest()

    def _add(self, name: str, value: np.ndarray) -> None:
        digest = xxhash.xxh3_128(f"{name} {value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data)
        self._digests[name] = digest.hexdigest()


def record_source(folder: Path, identity: str) -> None:
    """Notes beside a quantized copy which base it was made from, so that the base's adapters fit it."""
    (folder / RECORD).write_text(json.dumps({"base_hash": identity}, indent=2) + "\n")
