"""What a folder's config.json says of the decoder, checked field by field: it comes from anywhere."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from qlora_jax.io.foreign import check_own_format
from qlora_jax.io.json_object import read_object
from qlora_jax.io.peft_types import is_number
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.tied import stores_another_head
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.families.rope import check_numbers

MOST_LAYERS = 4096


class Rule(NamedTuple):
    """What a field may hold, in code and in words."""

    allows: Callable[[Any], bool]
    words: str


def _whole(most: int) -> Rule:
    return Rule(lambda v: type(v) is int and 1 <= v <= most, f"a whole number from 1 to {most:,}")


SIZE, POSITIVE = _whole(2**31 - 1), Rule(lambda v: is_number(v) and v > 0, "a number above 0")
SWITCH = Rule(lambda v: isinstance(v, bool), "true or false")
REQUIRED = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), SIZE),
    "num_hidden_layers": _whole(MOST_LAYERS),
    "rms_norm_eps": POSITIVE,
    "initializer_range": Rule(lambda v: is_number(v) and v >= 0, "a number from 0 on"),
    "hidden_act": Rule(lambda v: isinstance(v, str), "a name"),
    "tie_word_embeddings": SWITCH,
}
OPTIONAL = {
    **dict.fromkeys(("head_dim", "sliding_window"), SIZE),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), SWITCH),
    "rope_theta": POSITIVE,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(lambda v: isinstance(v, dict), "an object")),
    "layer_types": Rule(lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), "a list of names"),
    "max_window_layers": Rule(lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
}

# The weights themselves say in which dtype and packed how they are.
UNREAD = ("quantization_config", "dtype", "torch_dtype")


def read_config(folder: Path) -> ModelConfig:
    """The decoder's configuration from the config.json of a folder, or from such a file alone.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON object, or a field holds what it cannot; the message names the field.
      NotImplementedError: a family, a setting or a kind of quantization that qlora-jax does not have.
    """
    file = folder if folder.is_file() else folder / "config.json"
    check_own_format(file.parent)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: a Hugging Face model folder holds one")
    settings = read_object(file)
    try:
        config = parse_config(settings)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return _untied(config, folder)


def parse_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The decoder's configuration from the object in a config.json. Raises as `read_config` does."""
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise NotImplementedError(f"model_type {family!r} is not supported; these are: {', '.join(FAMILIES)}")
    given = {name: rule for name, rule in (REQUIRED | OPTIONAL).items() if settings.get(name) is not None}
    _check(settings, given)
    if settings.get("rope_theta", 0) is None:
        raise ValueError("rope_theta is null, expected a number above 0")
    check_numbers(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    values = {name: value for name, value in settings.items() if name not in UNREAD}
    try:
        hf = transformers.AutoConfig.for_model(**values)
    except Exception as error:  # transformers' own checks raise anything
        raise ValueError(f"transformers cannot read it: {' '.join(str(error).split())}") from error
    _check(vars(hf), {name: rule for name, rule in REQUIRED.items()})
    return FAMILIES[family].from_hf(hf)


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for name, rule in rules.items():
        value = values.get(name)
        if not rule.allows(value):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}…"
            raise ValueError(f"{name} is {shown}, expected {rule.words}")


def _untied(config: ModelConfig, folder: Path) -> ModelConfig:
    """As transformers does: a head of its own in the weights outweighs a configuration that ties it."""
    if not config.tie_embeddings or not folder.is_dir():
        return config
    try:
        tensors = TensorFolder(folder)
    except (FileNotFoundError, ValueError):
        return config  # whoever needs the weights says what is wrong with them
    return dataclasses.replace(config, tie_embeddings=not stores_another_head(tensors))
