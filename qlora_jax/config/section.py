"""A section of a configuration: named fields with a type, a range and a line of help, checked on construction."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from qlora_jax.config.values import Rule, convert, describe

ABOVE_ZERO = Rule("above 0", lambda value: value > 0)
NOT_ZERO = Rule("other than 0", lambda value: value != 0)
AT_LEAST_ZERO = Rule("of at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Rule("of at least 1", lambda value: value >= 1)
BELOW_ONE = Rule("from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
FRACTION = Rule("between 0 and 1", lambda value: 0 < value < 1)
NUMBER_OR_SHARE = Rule("of at least 0, or a share below 1", lambda value: value >= 0 and (value < 1 or value % 1 == 0))
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)


# Whether a field may differ when a run goes on: free, where it changes how long, how fast or how a run is watched, and
# not what is learned; said, where train.resume_with=changed says so: another curriculum for the same weights.
Resume = Literal["free", "said", "fixed"]


def option(default: Any, help: str, rule: Rule | None = None, *, resume: Resume = "fixed") -> Any:
    """A dataclass field with its one-line description, for numbers the range they must lie in, and its Resume."""
    metadata = {"help": help, "rule": rule, "resume": resume}
    if isinstance(default, dict) or is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_unknown(section: "type[Section]", names: Iterable[str]) -> None:
    """ValueError that names the nearest known field when a name is not a field of the section."""
    known = [item.name for item in fields(section)]
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {section.PREFIX}.{near[0]}? " if near else ""
        raise ValueError(f"{section.PREFIX}.{name} is unknown: {hint}Known: {', '.join(known)}")


def refuse_bad_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r}: expected a regular expression, but {error}") from error


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the sections: refuses unknown names, wrong types and numbers out of range (ValueError)."""

    PREFIX: ClassVar[str] = "config"

    def __new__(cls, **settings: Any) -> "Section":
        refuse_unknown(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = f"{self.PREFIX}.{item.name}", getattr(self, item.name)
            expected = describe(item.type)
            matched, converted = convert(value, item.type)
            if not matched:
                raise ValueError(f"{name}={value!r}: expected {expected}")
            rule = item.metadata["rule"]
            if rule and not rule.accepts(converted):
                raise ValueError(f"{name}={value!r}: expected {expected} {rule.words}")
            object.__setattr__(self, item.name, converted)
