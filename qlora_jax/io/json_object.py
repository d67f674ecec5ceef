"""JSON objects in the files of a model's folder, which come from anywhere."""

import json
from pathlib import Path
from typing import Any

LARGEST = 2**24  # bytes: the index of the largest checkpoints has a tenth


def read_object(file: Path) -> dict[str, Any]:
    """The object in a small file. Raises ValueError, with the file's name."""
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, at most {LARGEST:,} are read: download it again")
    return parse_object(file.read_bytes(), str(file))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object in a text. Raises ValueError that begins with `where`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, no JSON object: download it again")
    return found
