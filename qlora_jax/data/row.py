"""One row of a data set, as it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """The columns of a row. `origin` is for messages: "train.jsonl, row 17" (rows and lines count from 1).

    problem: why the row could not be read, where it could not; it then has no columns.
    """

    values: Mapping[str, Any]
    origin: str
    problem: str = ""
