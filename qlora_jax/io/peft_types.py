"""What the settings of an adapter_config.json may be: its types, numbers and patterns, checked before any is used."""

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.lora.patterns import check_patterns
from qlora_jax.lora.targets import whole_paths

LARGEST_RANK = 1 << 16


def is_number(value: Any) -> bool:
    """Within float's range, as integers of any length are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def is_factor(value: Any) -> bool:
    """What may scale an update: 0 would switch it off."""
    return is_number(value) and value != 0


def is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def maps(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


RANK = f"a whole number from 1 to {LARGEST_RANK:,}"
# Each setting that is read: what it may be, and in words. null is always as good as leaving it out.
TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (is_rank, RANK),
    "lora_alpha": (is_factor, "a number other than 0"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 up to, but not including, 1"),
    "target_modules": (lambda value: isinstance(value, str) or is_names(value), "a text or a list of texts"),
    "target_parameters": (is_names, "a list of texts"),
    "exclude_modules": (lambda value: isinstance(value, str) or is_names(value), "a text or a list of texts"),
    "layers_pattern": (lambda value: isinstance(value, str) or is_names(value), "a text or a list of texts"),
    "layers_to_transform": (
        lambda value: is_index(value) or (isinstance(value, list) and all(map(is_index, value))),
        "a whole number or a list of them",
    ),
    "rank_pattern": (maps(is_rank), f"an object whose values are each {RANK}"),
    "alpha_pattern": (maps(is_factor), "an object whose values are numbers other than 0"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
}


def check_types(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuses settings of other types, and patterns that could take long.

    Raises:
      ValueError, NotImplementedError: with the file, the setting, its value and what was expected.
    """
    for name, (fits, words) in TYPES.items():
        value = settings.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{file}: {name}={reprlib.repr(value)}: expected {words}: save the adapter again")
    targets = settings.get("target_modules")
    given = {
        "target_modules": [targets] if isinstance(targets, str) else [],
        "rank_pattern": whole_paths(settings.get("rank_pattern") or {}),
        "alpha_pattern": whole_paths(settings.get("alpha_pattern") or {}),
    }
    for name, patterns in given.items():
        try:
            check_patterns(patterns)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{file}: {name}: {error}") from error
