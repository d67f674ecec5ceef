"""Which modules get an adapter: PEFT's matching rules over a model's module paths."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config import LoraSection
from qlora_jax.lora.patterns import patterns_of

# "all-linear" leaves the output layer out, as PEFT does.
OUTPUT_LAYER = "lm_head"


class Target(NamedTuple):
    """Rank and scale of one adapted module."""

    rank: int
    scale: float


def resolve_targets(config: LoraSection, modules: Sequence[str]) -> dict[str, Target]:
    """The adapted ones of `modules` (Hugging Face module paths such as "model.layers.0.self_attn.q_proj").

    Raises:
      ValueError: a target that matches no module; the message lists what can be matched.
    """
    chosen = _matching(config.targets, modules)
    return {name: _target(config, name) for name in modules if name in chosen}


def _matching(targets: str | tuple[str, ...], modules: Sequence[str]) -> set[str]:
    if targets == "all-linear":
        return {name for name in modules if name != OUTPUT_LAYER}
    if isinstance(targets, str):
        pattern = patterns_of((targets,))
        return _required(targets, {name for name in modules if pattern.first(name) is not None}, modules)
    chosen = [_required(t, {name for name in modules if f".{name}".endswith(f".{t}")}, modules) for t in targets]
    return set().union(*chosen)


def _required(target: str, found: set[str], modules: Sequence[str]) -> set[str]:
    if not found:
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in modules})
        raise ValueError(
            f"lora.targets: {target!r} matches no module. Names that can be matched: {', '.join(suffixes)}; "
            f"whole paths look like {modules[0]!r}; a single string is a regular expression for a whole path, "
            f"or 'all-linear'"
        )
    return found


def _target(config: LoraSection, name: str) -> Target:
    rank = _exception(config.rank_pattern, name, config.rank)
    alpha = _exception(config.alpha_pattern, name, config.alpha)
    return Target(rank, scale_of(config, rank, alpha))


def scale_of(config: LoraSection, rank: int, alpha: float) -> float:
    """The factor on B·A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if config.variant == "rslora" else alpha / rank


def whole_paths(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys of rank_pattern or alpha_pattern as patterns for whole paths: each stands for the end of one."""
    return tuple(rf"(.*\.)?({key})" for key in keys)


def _exception(pattern: Mapping[str, float], name: str, default: float):
    found = patterns_of(whole_paths(pattern)).first(name)
    return default if found is None else list(pattern.values())[found]
