"""What `rope_parameters` of a Hugging Face configuration mean."""

import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.specs import RopeScaling

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor"),
    *("partial_rotary_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta"),
)


def check_numbers(parameters: Mapping[str, Any]) -> None:
    """Refuses numbers that cannot be, before transformers computes with them. Raises ValueError."""
    for name in NUMBERS:
        if parameters.get(name) is not None:
            number(parameters, name)


def rope_scaling(parameters: Mapping[str, Any], *, max_position: int, dims: int) -> RopeScaling:
    """The scaling of a configuration whose `rope_parameters` transformers has completed.

    Args:
      dims: how many dimensions of a head are rotated.

    Raises:
      ValueError: a parameter that is absent, or holds what it cannot.
      NotImplementedError: another kind.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in KINDS:
        raise NotImplementedError(f"rope_parameters: rope_type {kind!r} is not supported, only {', '.join(KINDS)}")
    if kind == "default":
        return RopeScaling()
    read = {
        "linear": lambda: RopeScaling(kind=kind, factor=number(parameters, "factor")),
        "dynamic": lambda: RopeScaling(
            kind=kind, factor=number(parameters, "factor", 1), original_max_position=max_position
        ),
        "yarn": lambda: _yarn(parameters, max_position),
        "longrope": lambda: _longrope(parameters, max_position, dims),
        "llama3": lambda: _llama3(parameters),
        "proportional": lambda: RopeScaling(
            kind=kind,
            factor=number(parameters, "factor") if parameters.get("factor") is not None else 1.0,
            moving=int(_share(parameters) * dims // 2),
        ),
    }
    return read[kind]()


def _llama3(parameters: Mapping[str, Any]) -> RopeScaling:
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low >= high:
        raise ValueError(f"rope_parameters: low_freq_factor {low} must be below high_freq_factor {high}")
    return RopeScaling(
        kind="llama3",
        factor=number(parameters, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_positions(parameters),
    )


def _yarn(parameters: Mapping[str, Any], max_position: int) -> RopeScaling:
    original = _positions(parameters)
    factor = _factor(parameters, max_position, original)
    attention = parameters.get("attention_factor")
    scales = [_optional(parameters, name) for name in ("mscale", "mscale_all_dim")]
    if attention is not None:
        attention = number(parameters, "attention_factor")
    elif all(scales):
        attention = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    else:
        attention = _magnitude(factor, 1.0)
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"rope_parameters: truncate is {truncate!r}, expected true or false")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=attention,
        beta_fast=_optional(parameters, "beta_fast") or 32.0,
        beta_slow=_optional(parameters, "beta_slow") or 1.0,
        truncate=truncate,
    )


def _longrope(parameters: Mapping[str, Any], max_position: int, dims: int) -> RopeScaling:
    original = _positions(parameters)
    factor = _factor(parameters, max_position, original)
    if parameters.get("attention_factor") is not None:
        attention = number(parameters, "attention_factor")
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=attention,
        short_factors=_factors(parameters, "short_factor", dims),
        long_factors=_factors(parameters, "long_factor", dims),
    )


def _magnitude(factor: float, scale: float) -> float:
    """How much larger the scores of stretched positions are made (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _factor(parameters: Mapping[str, Any], max_position: int, original: int) -> float:
    """The stated factor, else by how much the positions were extended."""
    return max_position / original if parameters.get("factor") is None else number(parameters, "factor")


def _positions(parameters: Mapping[str, Any]) -> int:
    value = number(parameters, "original_max_position_embeddings", 2)
    if value != int(value):
        raise ValueError(f"rope_parameters: original_max_position_embeddings is {value}, expected a whole number")
    return int(value)


def _share(parameters: Mapping[str, Any]) -> float:
    """Which share of a head's dimensions is rotated. Raises ValueError."""
    share = parameters.get("partial_rotary_factor")
    return 1.0 if share is None else number(parameters, "partial_rotary_factor")


def rotated_dims(parameters: Mapping[str, Any], head_dim: int) -> int:
    """How many of a head's dimensions are rotated. Raises ValueError."""
    if parameters.get("rope_type") == "proportional":
        return head_dim  # all pairs have frequencies, of which some are zero
    return int(head_dim * _share(parameters))


def _factors(parameters: Mapping[str, Any], name: str, dims: int) -> tuple[float, ...]:
    values = parameters.get(name)
    if not isinstance(values, list) or len(values) != dims // 2:
        size = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"rope_parameters: {name} has {size} numbers, expected {dims // 2}")
    return tuple(number({name: value}, name) for value in values)


def _optional(parameters: Mapping[str, Any], name: str) -> float:
    return 0.0 if parameters.get(name) in (None, 0) else number(parameters, name)


def number(parameters: Mapping[str, Any], name: str, least: int = 0) -> float:
    """One of the parameters, above 0 and not below `least`. Raises ValueError."""
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30 or value < least:
        allowed = f"from {least} on" if least else "above 0"
        raise ValueError(f"rope_parameters: {name} is {value!r}, expected a number {allowed}")
    return float(value)
