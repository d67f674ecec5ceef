"""JSON objects in the files of a model's folder, which come from anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = 2**24  # bytes: the index of the largest checkpoints has a tenth


def read_object(file: Path) -> dict[str, Any]:
    """The object in a small file. Raises ValueError, with the file's name."""
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, at most {LARGEST:,} are read: download it again")
    return parse_object(file.read_bytes(), str(file))


def parse_object(
    text: bytes,
    where: str,
    *,
    advice: str = "download it again",
    check: Callable[[bytes], None] = lambda text: None,
    parse_float: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """The object in a text. Raises ValueError that begins with `where` and ends with `advice`.

    Args:
      check: refuses a text before it is parsed, by ValueError.
      parse_float, parse_constant: as of json.loads.
    """
    try:
        check(text)
        found = json.loads(text, parse_float=parse_float, parse_constant=parse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, no JSON object: {advice}")
    return found
