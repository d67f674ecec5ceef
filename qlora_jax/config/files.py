"""Configurations as Python files, command line and JSON."""

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from qlora_jax.config.schema import SECTIONS, Config
from qlora_jax.config.section import Section, refuse_unknown
from qlora_jax.config.values import from_text


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types; `from_dict` gives the same configuration back."""
    return asdict(config)


def from_dict(settings: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote. ValueError for unknown keys and wrong types."""
    whole: dict[str, Any] = {}
    for name, value in settings.items():
        section = SECTIONS.get(name)
        whole[name] = section(**value) if section and isinstance(value, Mapping) else value
    return Config(**whole)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the Python file's `config`, then apply overrides such as `--config.lora.rank=8`.

    FileNotFoundError for a missing file; ValueError for one that fails or holds no Config, and for
    overrides that name no field or do not fit its type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist: expected e.g. configs/7b.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"config file {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"config file {path}: expected `config = Config(...)`, found {config!r}")
    config = apply_overrides(config, overrides)
    geometry = config.model.geometry and str(path.parent / config.model.geometry)
    return replace(config, model=replace(config.model, geometry=geometry))


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `--config.section.field=value` (or `… value`) applied, the last one winning."""
    changes: dict[str, dict[str, Any]] = {}
    for name, text in split_overrides(overrides):
        section_name, _, field_name = name.rpartition(".")
        section: type[Section] = Config
        if section_name:
            refuse_unknown(Config, [section_name])
            if section_name not in SECTIONS:
                raise ValueError(f"config.{name} is unknown: config.{section_name} has no fields of its own")
            section = SECTIONS[section_name]
        elif field_name in SECTIONS:
            raise ValueError(f"config.{name}={text!r}: expected a field of it: {example(field_name)}")
        refuse_unknown(section, [field_name])
        kind = next(item.type for item in fields(section) if item.name == field_name)
        changes.setdefault(section_name, {})[field_name] = from_text(text, kind)
    change_length(changes.get("train", {}))
    top = changes.pop("", {})
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **top, **sections)


def change_length(changes: dict[str, Any]) -> None:
    """A new length takes the place of the file's own: train.steps unsets train.epochs, and the reverse."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get(name) is not None:
            changes.setdefault(other, None)


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """`["--config.a.b=1", "--config.c", "2"]` as `[("a.b", "1"), ("c", "2")]`."""
    pairs: list[tuple[str, str]] = []
    rest = iter(overrides)
    for word in rest:
        if not word.startswith("--config."):
            raise ValueError(f"{word!r}: expected --config.section.field=value")
        name, equals, text = word.removeprefix("--config.").partition("=")
        value = text if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise ValueError(f"{word} has no value: expected {word}=value")
        pairs.append((name, value))
    return pairs


def example(section: str) -> str:
    return f"--config.{section}.{fields(SECTIONS[section])[0].name}=value"
