"""JSON that comes from outside, bounded before it is parsed: how deep, how many lists, names and values."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qlora_jax.io.json_object import parse_object

# A string, also one that does not end; possessive, so that no text takes more than one pass.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
BRACKET = re.compile(rb"[\[\]{}]")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most of each that a text may have.

    Attributes:
      depth: lists and objects within each other.
      containers: lists and objects in all.
      names: members of objects in all.
      values: members of lists and objects in all.
    """

    depth: int = 64
    containers: int = 50_000
    names: int = 50_000
    values: int = 1 << 20


FILE = Bounds()
FILE_BYTES = 1 << 20


def check_structure(text: bytes, bounds: Bounds) -> None:
    """Refuses a text by its brackets, colons and commas, in one pass that builds nothing. Raises ValueError."""
    if b"\0" in text:
        raise ValueError("it is not UTF-8: it holds zero bytes")
    skeleton = STRING.sub(b"", text)
    for what, count, most in (
        ("lists and objects", skeleton.count(b"[") + skeleton.count(b"{"), bounds.containers),
        ("names", skeleton.count(b":"), bounds.names),
        ("values", skeleton.count(b","), bounds.values),
    ):
        if count > most:
            raise ValueError(f"it has {count:,} {what}, at most {most:,} are read")
    depth = deepest = 0
    for bracket in BRACKET.findall(skeleton):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > bounds.depth:
        raise ValueError(f"its lists and objects are nested {deepest:,} deep, at most {bounds.depth} are read")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a small file of an adapter.

    Raises:
      OSError: it cannot be read.
      ValueError: no JSON object, more than FILE_BYTES or FILE's bounds, or a number that is not finite; names the file.
    """
    # A pipe would be waited for.
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    with file.open("rb") as opened:
        text = opened.read(FILE_BYTES + 1)
    if len(text) > FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, at most {FILE_BYTES:,} are read")
    return parse_object(
        text,
        str(file),
        advice="save the adapter again",
        check=lambda text: check_structure(text, FILE),
        parse_constant=_not_finite,
        parse_float=_finite,
    )


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is no finite number")
    return value
