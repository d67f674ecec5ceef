"""What a folder's config.json says of the decoder, checked field by field: it comes from anywhere."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from qlora_jax.io.foreign import check_own_format
from qlora_jax.io.json_object import read_object
from qlora_jax.io.packed import open_tensors
from qlora_jax.io.peft_types import is_number
from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.io.tied import stores_another_head
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import FAMILIES, WRAPPERS
from qlora_jax.models.families.names import names_in
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
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "block_ffn_dim_multiplier"), POSITIVE),
    **dict.fromkeys((f"linear_num_{kind}_heads" for kind in ("key", "value")), SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"), SIZE),
    **dict.fromkeys(("conv_L_cache", "block_multiple_of"), SIZE),
    **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim"), SWITCH),
    "initializer_range": Rule(lambda v: is_number(v) and v >= 0, "a number from 0 on"),
    "hidden_act": Rule(lambda v: isinstance(v, str), "a name"),
    "tie_word_embeddings": SWITCH,
}
OPTIONAL = {
    "head_dim": SIZE,
    "sliding_window": Rule(lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), SWITCH),
    "rope_theta": POSITIVE,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(lambda v: isinstance(v, dict), "an object")),
    "layer_types": Rule(lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), "a list of names"),
    "max_window_layers": Rule(lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
}

# As transformers spells them in config.json.
SPECIAL = ("Infinity", "-Infinity", "NaN")
# The weights themselves say in which dtype and packed how they are.
UNREAD = ("quantization_config", "dtype", "torch_dtype")


def read_config(folder: Path) -> ModelConfig:
    """The decoder's configuration from the config.json of a folder, or from such a file alone.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON object, or a field holds what it cannot; the message names the field.
      NotImplementedError: a family, a setting or a kind of quantization that qlora-jax does not have.
    """
    return read_with_tensors(folder)[0]


def read_with_tensors(folder: Path) -> tuple[ModelConfig, TensorFolder | None]:
    """As `read_config`, and the folder's tensors, None where they cannot be read: who needs them finds out why."""
    file = folder if folder.is_file() else folder / "config.json"
    check_own_format(file.parent)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: a Hugging Face model folder holds one")
    settings, tensors = read_object(file), _tensors(folder)
    try:
        config = parse_config(settings, () if tensors is None else tensors.names)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if tensors is None or not config.tie_embeddings:
        return config, tensors
    # As transformers does: a head of its own in the weights outweighs a configuration that ties it.
    tied = not stores_another_head(tensors, config.names)
    return dataclasses.replace(config, tie_embeddings=tied), tensors


def parse_config(settings: Mapping[str, Any], found: Collection[str] = ()) -> ModelConfig:
    """The decoder's configuration from the object in a config.json. Raises as `read_config` does.

    `found`: the names of the checkpoint's tensors, where there is one.
    """
    family, architecture = settings.get("model_type"), _architecture(settings)
    if not isinstance(family, str) or family not in (*FAMILIES, *WRAPPERS):
        known = ", ".join(sorted((*FAMILIES, *WRAPPERS)))
        of = f" ({architecture})" if architecture else ""
        raise NotImplementedError(f"model_type {family!r}{of} is not supported; these are: {known}")
    hf = _read_by_transformers(settings, wrapped=family in WRAPPERS)
    if hf.model_type not in FAMILIES:
        raise NotImplementedError(
            f"{family} with text of {hf.model_type!r} is not supported, only {', '.join(FAMILIES)}"
        )
    config = FAMILIES[hf.model_type].from_hf(hf)
    names = names_in(config.names, wrapped=family in WRAPPERS, architecture=architecture, found=found)
    return dataclasses.replace(config, names=names)


def _read_by_transformers(settings: Mapping[str, Any], *, wrapped: bool) -> Any:
    """transformers' configuration of the text model, all fields checked before and after."""
    text = settings.get("text_config", {}) if wrapped else settings
    if not isinstance(text, dict):
        raise ValueError(f"text_config is {text!r}, expected an object")
    _check(text, {name: rule for name, rule in (REQUIRED | OPTIONAL).items() if text.get(name) is not None})
    if text.get("rope_theta", 0) is None:
        raise ValueError("rope_theta is null, expected a number above 0")
    _check_rope(text.get("rope_parameters") or text.get("rope_scaling") or {})
    values = {name: _decoded(value) for name, value in settings.items() if name not in UNREAD}
    try:
        hf = transformers.AutoConfig.for_model(**values)
    except Exception as error:  # transformers' own checks raise anything
        raise ValueError(f"transformers cannot read it: {' '.join(str(error).split())}") from error
    hf = hf.get_text_config() if wrapped else hf
    _check(vars(hf), {name: rule for name, rule in REQUIRED.items() if name in vars(hf)})
    return hf


def _decoded(value: Any) -> Any:
    """A value as transformers means it: what JSON has no word for is written as an object."""
    if isinstance(value, dict):
        special = value.get("__float__") if len(value) == 1 else None
        return float(special) if special in SPECIAL else {name: _decoded(one) for name, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def _check_rope(parameters: Mapping[str, Any]) -> None:
    """Each kind of layer may have its own."""
    each: list[Mapping[str, Any]] = [one for one in parameters.values() if isinstance(one, dict)]
    for one in each or [parameters]:
        check_numbers(one)


def _architecture(settings: Mapping[str, Any]) -> str:
    """The class that config.json names, or nothing."""
    named = settings.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def _tensors(folder: Path) -> TensorFolder | None:
    """The folder's tensors; None where there are none, or where they cannot be read: who needs them says why."""
    try:
        return open_tensors(folder) if folder.is_dir() else None
    except (FileNotFoundError, ValueError):
        return None


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for name, rule in rules.items():
        value = values.get(name)
        if not rule.allows(value):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}…"
            raise ValueError(f"{name} is {shown}, expected {rule.words}")
