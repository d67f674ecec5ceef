"""Values against type annotations: what fits, what a command line's text means, and how to name the type."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

# Several sources of rows, each an object; a plain path stands for {"path": …}.
SOURCES = tuple[dict, ...]
WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "text", NoneType: "none"}


@dataclass(frozen=True)
class Rule:
    """A range, in words and as a test. It concerns the numbers: text and None are let through."""

    words: str
    holds: Callable[[float], bool]

    def accepts(self, value: Any) -> bool:
        """Whether a number, or each number in a mapping, lies in the range."""
        numbers = value.values() if isinstance(value, Mapping) else [value]
        return all(self.holds(number) for number in numbers if isinstance(number, int | float))


def alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def describe(kind: Any) -> str:
    """The annotation in words, e.g. `none or an integer`."""
    return " or ".join(_describe_one(one) for one in sorted(alternatives(kind), key=lambda one: one is not NoneType))


def _describe_one(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if kind == SOURCES:
        return 'a list of {"path", "weight"}'
    if origin is tuple:
        return "a list of names"
    if origin is Mapping:
        return f'an object {{"name": {WORDS[get_args(kind)[1]]}}}'
    return WORDS.get(kind) or kind.__name__


def convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """(whether the value fits the annotation, the value in that very type: 1 as 1.0, a list as a tuple)."""
    for one in alternatives(kind):
        matched, converted = _convert_one(value, one)
        if matched:
            return True, converted
    return False, value


def _convert_one(value: Any, kind: Any) -> tuple[bool, Any]:
    origin = get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if kind == SOURCES:
        fits = isinstance(value, list | tuple) and all(isinstance(one, str | dict) for one in value)
        return fits, tuple({"path": one} if isinstance(one, str) else one for one in value) if fits else value
    if origin is tuple:
        fits = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        return (True, tuple(value)) if fits else (False, value)
    if origin is Mapping:
        return _convert_mapping(value, get_args(kind)[1])
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value), float(value)
    # True is an int to Python, but not to whoever wrote rank=True.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), value


def _convert_mapping(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    pairs = {name: convert(one, kind) for name, one in value.items()}
    fits = all(isinstance(name, str) and matched for name, (matched, _) in pairs.items())
    return (True, {name: one for name, (_, one) in pairs.items()}) if fits else (False, value)


def from_text(text: str, kind: Any) -> Any:
    """What a command line's text means for the annotation; the text itself where it means nothing."""
    for one in sorted(alternatives(kind), key=lambda one: one is str):  # text fits everything: try it last
        matched, value = _from_text_one(text, one)
        if matched:
            return value
    return text


def _from_text_one(text: str, kind: Any) -> tuple[bool, Any]:
    origin = get_origin(kind)
    if origin is Literal:
        return text in get_args(kind), text
    if kind is NoneType:
        return text.lower() in ("none", "null"), None
    if kind is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    if kind == SOURCES:
        return _from_json_list(text)
    if origin is tuple:
        # Anything beyond names and commas is left to be a regular expression, as is `all-linear`.
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        return re.fullmatch(r"[\w., ]+", text) is not None, names
    if kind is str:
        return True, text
    reader = json.loads if origin is Mapping else kind
    try:
        return True, reader(text)
    except ValueError:
        return False, text


def _from_json_list(text: str) -> tuple[bool, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return False, text
    return isinstance(value, list), value
