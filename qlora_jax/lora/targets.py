"""Which modules get an adapter: PEFT's matching rules over a model's module paths."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config import LoraSection
from qlora_jax.lora.patterns import patterns_of

# "all-linear" leaves the output layer out, as PEFT does, and the experts and routers of a mixture: of those a run says
# that it wants them.
OUTPUT_LAYER = "lm_head"
EXPERTS, ROUTER = ".experts.", ".router."
EXPERTS_WORD = "experts"


class Target(NamedTuple):
    """Rank and scale of one adapted module."""

    rank: int
    scale: float


def resolve_targets(config: LoraSection, modules: Sequence[str]) -> dict[str, Target]:
    """The adapted ones of `modules` (Hugging Face module paths such as "model.layers.0.self_attn.q_proj").

    Raises:
      ValueError: a target that matches no module; the message lists what can be matched. Or dropout on experts.
    """
    chosen = _matching(config.targets, modules)
    _check_dropout(config, chosen)
    return {name: _target(config, name) for name in modules if name in chosen}


def _matching(targets: str | tuple[str, ...], modules: Sequence[str]) -> set[str]:
    if targets == "all-linear":
        return {name for name in modules if name != OUTPUT_LAYER and EXPERTS not in name and ROUTER not in name}
    if isinstance(targets, str):
        pattern = patterns_of((targets,))
        open_to = [name for name in modules if _asks_for(targets, name)]
        return _required(targets, {name for name in open_to if pattern.first(name) is not None}, modules)
    return set().union(*(_required(t, {name for name in modules if matches(t, name)}, modules) for t in targets))


def matches(target: str, module: str) -> bool:
    """Whether a target in a list is a module's path or the end of it."""
    return f".{module}".endswith(f".{target}") and _asks_for(target, module)


def _asks_for(target: str, module: str) -> bool:
    """Experts are asked for by name: "down_proj" has always meant linear layers."""
    return EXPERTS not in module or EXPERTS_WORD in target


def ending(module: str) -> str:
    """The shortest target that matches a module, and those of other layers."""
    parts = module.split(".")
    return ".".join(parts[-2:] if EXPERTS in module else parts[-1:])


def _required(target: str, found: set[str], modules: Sequence[str]) -> set[str]:
    if not found:
        endings = sorted({ending(name) for name in modules})
        experts = [name for name in endings if "." in name]
        hint = ""
        if experts:
            hint = f"; the experts are asked for as {' and '.join(experts)}"
        elif EXPERTS_WORD in target:
            hint = "; this model has no experts"
        raise ValueError(
            f"lora.targets: {target!r} matches no module. Names that can be matched: {', '.join(endings)}; "
            f"whole paths look like {modules[0]!r}; a single string is a regular expression for a whole path, "
            f"or 'all-linear'{hint}"
        )
    return found


def _check_dropout(config: LoraSection, chosen: set[str]) -> None:
    experts = sorted(name for name in chosen if EXPERTS in name)
    if config.dropout and experts:
        raise ValueError(
            f"lora.dropout={config.dropout}: adapters of experts ({experts[0]!r}) have none, in PEFT neither; set 0"
        )


def _target(config: LoraSection, name: str) -> Target:
    rank = _exception(config.rank_pattern, name, config.rank)
    alpha = _exception(config.alpha_pattern, name, config.alpha)
    return Target(rank, scale_of(config, rank, alpha))


def scale_of(config: LoraSection, rank: int, alpha: float) -> float:
    """The factor on B·A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if config.variant == "rslora" else alpha / rank


def by_paths(config: LoraSection, targets: Mapping[str, Target]) -> LoraSection:
    """The section that names exactly these modules, each with its rank and scale, by their whole paths."""
    paths = tuple(sorted(targets))
    ranks = {name: targets[name].rank for name in paths}
    alphas = {name: targets[name].scale / scale_of(config, targets[name].rank, 1.0) for name in paths}
    return dataclasses.replace(config, targets=paths, rank_pattern=ranks, alpha_pattern=alphas)


def whole_paths(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys of rank_pattern or alpha_pattern as patterns for whole paths: each stands for the end of one."""
    return tuple(rf"(.*\.)?({key})" for key in keys)


def _exception(pattern: Mapping[str, float], name: str, default: float):
    found = patterns_of(whole_paths(pattern)).first(name)
    return default if found is None else list(pattern.values())[found]
