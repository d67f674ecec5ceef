"""What stands in qlora_jax.json beside an adapter: which base it was trained on, and how that was stored."""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.config import QuantSection
from qlora_jax.io.bounded_json import read_object
from qlora_jax.quant.formats import FORMATS

TYPES = {
    "base_hash": (str | None, "a text or null"),
    "method": (str, "a text"),
    "double": (bool, "true or false"),
}
TABLES = ("lm_head", "embedding")
STORED = tuple(field.name for field in dataclasses.fields(QuantSection))


def read_record(file: Path) -> dict[str, Any]:
    """The record, none of whose known entries is of another type.

    Raises:
      ValueError: no JSON object, or an entry that none of qlora-jax's records has; names the file.
    """
    record = read_object(file)
    for name, (kind, words) in TYPES.items():
        if name in record and not isinstance(record[name], kind):
            raise ValueError(f"{file}: {name}={reprlib.repr(record[name])}: expected {words}")
    for name in TABLES:
        if record.get(name, "none") not in list(FORMATS):
            shown = reprlib.repr(record[name])
            raise ValueError(f"{file}: {name}={shown}: expected one of {', '.join(FORMATS)}")
    return record


def stored_as(record: Mapping[str, Any]) -> QuantSection:
    """How a record that was read says that the base was stored; the default for what it does not say."""
    return QuantSection(**{name: record[name] for name in STORED if name in record})
