"""A few values of every tensor of a base: whether another folder holds the same ones in another dtype, or unpacked.

A digest of all bytes tells one file from any other, and so it also tells a base from its own copy in 32 bits. A sample
forgives just that: rounding a value to the other folder's dtype, and packing it in NF4.
"""

import base64
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qlora_jax.quant.nf4 import CODEBOOKS
from qlora_jax.quant.nf4.layout import BLOCK

POINTS = 8
# One letter for each dtype of a tensor; a capital one where it is packed, for what it was packed from.
DTYPES = {"b": ml_dtypes.bfloat16, "h": np.float16, "f": np.float32}
LETTERS = {"bfloat16": "b", "float16": "h", "float32": "f", "float64": "f"}
# Of the sampled NF4 codes: builds of bitsandbytes differ in a value on the border between two.
ODD_CODES = 0.002


@dataclass(frozen=True)
class Point:
    """One tensor's part of a sample.

    Attributes:
      form: its dtype's letter.
      values: float32 `[POINTS]`; codes where it is packed.
      blocks: float32 `[POINTS, ≤ 64]`, the blocks that the values stand in; None where it is packed.
      places: where in its block each value stands.
    """

    form: str
    values: np.ndarray
    blocks: list[np.ndarray] | None = None
    places: np.ndarray | None = None


def plain_point(value: np.ndarray) -> Point:
    """Of an unpacked tensor."""
    flat, at = value.reshape(-1), _positions(value.size)
    blocks = [flat[i // BLOCK * BLOCK :][:BLOCK].astype(np.float32) for i in at]
    return Point(LETTERS[str(value.dtype)], flat[at].astype(np.float32), blocks, at % BLOCK)


def packed_point(codes: np.ndarray, size: int, dtype: str) -> Point:
    """Of a tensor of `size` values that bitsandbytes packed from `dtype`; `codes` as its file holds them."""
    flat, at = codes.reshape(-1).view(np.uint8), _positions(size)
    found = np.where(at % 2 == 0, flat[at // 2] >> 4, flat[at // 2] & 15)
    return Point(LETTERS[dtype].upper(), found.astype(np.float32))


def to_text(points: list[Point]) -> str:
    """The sample as an adapter's record keeps it."""
    values = np.concatenate([point.values for point in points]).astype("<f4")
    return "".join(point.form for point in points) + ":" + base64.b64encode(values.tobytes()).decode()


def same_values(recorded: str, points: list[Point]) -> bool:
    """Whether the tensors of a recorded sample are these, in other dtypes or packed. False for the same dtypes: there
    the digests decide, which have seen every value."""
    forms, values = _from_text(recorded)
    found = "".join(point.form for point in points)
    if len(forms) != len(found) or forms == found:
        return False
    odd, codes = 0, 0
    for form, value, point in zip(forms, values, points, strict=True):
        if form.isupper():
            odd += int((value != _codes(point, form.lower())).sum())
            codes += POINTS
        elif point.form.isupper() or not _rounded_alike(value, form, point.values, point.form):
            return False
    return odd <= ODD_CODES * codes


def _positions(size: int) -> np.ndarray:
    return np.arange(1, POINTS + 1, dtype=np.int64) * size // (POINTS + 1)


def _from_text(text: str) -> tuple[str, np.ndarray]:
    """(forms, values `[T, POINTS]`); nothing where it is no sample."""
    forms, _, values = text.partition(":")
    try:
        table = np.frombuffer(base64.b64decode(values, validate=True), "<f4").reshape(-1, POINTS)
    except ValueError:
        return "", np.zeros((0, POINTS), np.float32)
    return (forms, table) if len(forms) == len(table) and set(forms.lower()) <= set(DTYPES) else ("", table[:0])


def _rounded_alike(a: np.ndarray, a_form: str, b: np.ndarray, b_form: str) -> bool:
    """Whether one is the other, rounded to its dtype."""
    return bool((_round(a, b_form) == b).all() or (_round(b, a_form) == a).all())


def _round(values: np.ndarray, form: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[form]).astype(np.float32)


def _codes(point: Point, form: str) -> np.ndarray:
    """The NF4 codes of a point's values, rounded to a dtype first where they are not packed yet."""
    if point.blocks is None or point.places is None:
        return point.values
    levels = CODEBOOKS["nf4"]
    thresholds = (levels[:-1] + levels[1:]) / np.float32(2)
    scaled = []
    for block, place in zip(point.blocks, point.places, strict=True):
        rounded = _round(block, form)
        scaled.append(rounded[place] * (np.float32(1) / max(np.abs(rounded).max(), np.float32(1e-38))))
    return (thresholds[None] < np.array(scaled, np.float32)[:, None]).sum(1).astype(np.float32)
