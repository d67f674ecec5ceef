"""Writing tensors as one safetensors file, or as shards with an index."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qlora_jax.io.safetensors import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, with the metadata that transformers and PEFT expect.

    Raises:
      OSError: with the system's errno, such as ENOSPC.
    """
    # The library writes each array's memory from its first byte on, whatever its strides.
    contiguous = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(contiguous, file, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), str(error), str(file)) from error
    file.chmod(mode)  # the library's files are private to the user who wrote them


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model.safetensors; or, where that would be larger than `shard_bytes`, files named
    model-0000x-of-0000y.safetensors and their index. Holds one shard's tensors in memory.
    """
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write_safetensors(folder / f"{len(shards)}.part", held)
        shards.append(list(held))
        held.clear()

    for name, value in tensors:
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard_bytes:
            flush()
        held[name] = value
        total += value.nbytes
    flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """The files' names tell how many there are, which is known only at the end."""
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for i, file in enumerate(files):
        (folder / f"{i}.part").rename(folder / file)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
