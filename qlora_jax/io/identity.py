"""Which base a folder holds: a digest of its tensors, or for a quantized copy that of the model it was made from."""

import json
import math
from pathlib import Path

import numpy as np
import xxhash

from qlora_jax.io.json_object import read_object
from qlora_jax.io.packed import reader_of
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.sample import LETTERS, Point, packed_point, plain_point, same_values, to_text

RECORD = "qlora_jax.json"
SAMPLE = "base_sample"  # in records: a few values of the base


class BaseHash(str):
    """A base's digest, 32 hexadecimal digits, with what else tells whether an adapter was trained on the base.

    As a text it is what has always been recorded, and equal to that of the same bytes.
    """

    points: list[Point]

    @classmethod
    def of(cls, digest: str, points: list[Point]) -> "BaseHash":
        found = cls(digest)
        found.points = points
        return found

    @property
    def sample(self) -> str:
        """A few of the base's values, for an adapter's record."""
        return to_text(self.points)

    def holds(self, sample: str) -> bool:
        """Whether a recorded sample is of this base in other dtypes, or packed."""
        return same_values(sample, self.points)


def sample_record(base_hash: str | None) -> dict[str, str]:
    """What stands beside a base's hash in a record; nothing for a base of random weights."""
    return {SAMPLE: base_hash.sample} if isinstance(base_hash, BaseHash) else {}


class BaseIdentity:
    """Takes in a folder's tensors as they are read, in any order, and says which base they are.

    The digest covers every tensor's name, dtype, shape and bytes; of a packed weight its scales and maps too.
    """

    def __init__(self, tensors: TensorFolder):
        self._tensors = tensors
        self._digests: dict[str, str] = {}
        self._points: dict[str, Point] = {}
        self._source = _recorded(tensors.folder / RECORD)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, taken in."""
        value = self._tensors.read(name)
        if name in self._tensors.copies or name in self._digests:
            return value
        self._add(name, value)
        reader = reader_of(self._tensors, name)
        if reader.sampled if reader else value.dtype.name in LETTERS:
            self._points[name] = self._point(name, value)
        for part in self._tensors.parts(name):
            self._add(part, self._tensors.read(part))
        return value

    def hexdigest(self) -> BaseHash:
        """The identity: the recorded source's where the folder is a quantized copy."""
        listing = "".join(f"{n}:{d}\n" for n, d in sorted(self._digests.items()))
        digest = xxhash.xxh3_128(listing.encode()).hexdigest() if self._source is None else self._source
        return BaseHash.of(digest, [point for _, point in sorted(self._points.items())])

    def _point(self, name: str, value: np.ndarray) -> Point:
        reader = reader_of(self._tensors, name)
        if reader is not None:
            dtype, shape = reader.origin(self._tensors, name)
            return packed_point(value, math.prod(shape), dtype)
        return plain_point(value)

    def _add(self, name: str, value: np.ndarray) -> None:
        digest = xxhash.xxh3_128(f"{name} {value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data)
        self._digests[name] = digest.hexdigest()


def record_source(folder: Path, identity: str) -> None:
    """Notes beside a quantized copy which base it was made from, so that the base's adapters fit it."""
    (folder / RECORD).write_text(json.dumps({"base_hash": identity}, indent=2) + "\n")


def _recorded(record: Path) -> str | None:
    """The hash in a quantized copy's record; None where there is none."""
    if not record.exists():
        return None
    source = read_object(record).get("base_hash")
    if not isinstance(source, str):
        raise ValueError(f"{record}: base_hash is {source!r}, expected a text: quantize the model again, or delete it")
    return source
