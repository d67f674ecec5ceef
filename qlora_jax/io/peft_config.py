"""LoraSection to PEFT's adapter_config.json and back."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.config import LoraSection
from qlora_jax.io.bounded_json import read_object
from qlora_jax.io.peft_experts import as_parameter, as_target, check_parameters, parted, with_parameters
from qlora_jax.io.peft_types import check_types
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.lora.kinds import KINDS
from qlora_jax.lora.patterns import check_patterns
from qlora_jax.lora.targets import EXPERTS, ROUTER, by_paths, ending, matches, whole_paths
from qlora_jax.models.families.names import WRAPPED

CONFIG = "adapter_config.json"
REQUIRED = ("r", "lora_alpha", "target_modules")
# Settings under which A and B alone do not give PEFT's result.
UNSUPPORTED = (
    *("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config"),
)
# Initializations that leave the base model's weights as they were.
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def to_peft(lora: LoraSection, targets: Mapping[str, Target], modules: Sequence[str], base: str) -> dict[str, Any]:
    """adapter_config.json for the adapted modules `targets` of a model whose linear layers are `modules`."""
    exact, linears, parameters = _exact(lora, targets, modules)
    return {
        "alpha_pattern": {name: _number(alpha) for name, alpha in exact.alpha_pattern.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(exact.alpha),
        # PEFT loads no parameter's adapter with dropout, which whoever uses an adapter does not need.
        "lora_dropout": 0.0 if parameters else exact.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": exact.rank,
        "rank_pattern": dict(exact.rank_pattern),
        "target_modules": linears if isinstance(linears, str) else list(linears),
        **({"target_parameters": list(parameters)} if parameters else {}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **{kind.switch: exact.variant == name for name, kind in KINDS.items() if kind.switch},
    }


def read_settings(file: Path) -> dict[str, Any]:
    """adapter_config.json, refused unless A and B of a plain LoRA or rsLoRA are all there is.

    Raises:
      ValueError: no JSON object, or a setting that is absent or of another type.
      NotImplementedError: a method or setting that qlora-jax does not have, or a pattern that could take long to match.
    """
    settings = read_object(file)
    if settings.get("target_parameters") and settings.get("target_modules") is None:
        settings["target_modules"] = []
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(f"{file}: peft_type {reprlib.repr(kind)} is not supported, only 'LORA'")
    absent = [key for key in REQUIRED if settings.get(key) is None]
    if absent:
        raise ValueError(f"{file} lacks {absent[0]!r}: save the adapter again")
    _refuse_unsupported(file, settings)
    check_types(file, settings)
    check_parameters(file, settings.get("target_parameters") or ())
    return settings


def from_peft(settings: Mapping[str, Any], modules: Sequence[str]) -> LoraSection:
    """The configuration of an adapter that has weights for `modules`."""
    return LoraSection(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout") or 0.0,
        targets=targets_of(settings, modules),
        variant=variant_of(settings),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )


def variant_of(settings: Mapping[str, Any]) -> Any:
    """The key of KINDS that PEFT's settings switch on."""
    return next((name for name, kind in KINDS.items() if kind.switch and settings.get(kind.switch)), "lora")


def _refuse_unsupported(file: Path, settings: Mapping[str, Any]) -> None:
    supported = "only LoRA and rsLoRA on linear layers are"
    switches = {kind.switch for kind in KINDS.values()}
    for key in UNSUPPORTED:
        if settings.get(key) and key not in switches:
            raise NotImplementedError(f"{file}: {key}={reprlib.repr(settings[key])} is not supported, {supported}")
    if settings.get("bias", "none") != "none":
        raise NotImplementedError(
            f"{file}: bias={reprlib.repr(settings['bias'])} is not supported, {supported} (bias='none')"
        )
    initial = settings.get("init_lora_weights")
    initial = initial.lower() if isinstance(initial, str) else initial
    if initial not in INITIALIZATIONS:
        raise NotImplementedError(
            f"{file}: init_lora_weights={reprlib.repr(initial)} changes the base model's weights: convert the adapter "
            f"with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )


def targets_of(settings: Mapping[str, Any], modules: Sequence[str]) -> str | tuple[str, ...]:
    """What is targeted, as far as it matches any of `modules`; these themselves where names do not say it."""
    targets, parameters = settings["target_modules"], settings.get("target_parameters") or ()
    if settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        return tuple(modules)
    if isinstance(targets, str):
        if parameters or (targets.lower() == "all-linear" and any(ROUTER in name for name in modules)):
            return tuple(modules)
        return "all-linear" if targets.lower() == "all-linear" else targets
    # PEFT ignores a name that matches nothing as long as another does.
    named = (*targets, *map(as_target, parameters))
    return tuple(target for target in named if any(matches(target, name) for name in modules))


Named = str | tuple[str, ...]


def _exact(
    lora: LoraSection, targets: Mapping[str, Target], modules: Sequence[str]
) -> tuple[LoraSection, Named, tuple[str, ...]]:
    """What names exactly `targets`: (ranks and alphas, target_modules, target_parameters)."""
    # The file's keys are sorted, and the first pattern that matches wins.
    ranks, alphas = dict(sorted(lora.rank_pattern.items())), dict(sorted(lora.alpha_pattern.items()))
    own = dataclasses.replace(lora, rank_pattern=ranks, alpha_pattern=alphas)
    as_modules, as_parameters = parted(modules)
    linears, parameters = _names(own, targets, as_modules), _names(own, targets, as_parameters, patterns=False)
    # PEFT matches patterns with the paths of parameters, where weights' have other ends than their modules'.
    same = not (ranks or alphas) or all(EXPERTS in name for name in as_parameters if name in targets)
    if linears is None or parameters is None or not (same and _readable(ranks, alphas)):
        own = by_paths(lora, targets)
        ranks, alphas = with_parameters(own.rank_pattern), with_parameters(own.alpha_pattern)
        own = dataclasses.replace(own, rank_pattern=ranks, alpha_pattern=alphas)
        linears, parameters = (tuple(sorted(targets.keys() & set(part))) for part in (as_modules, as_parameters))
    return own, linears, tuple(map(as_parameter, parameters))


def _names(
    lora: LoraSection, targets: Mapping[str, Target], modules: Sequence[str], *, patterns: bool = True
) -> Named | None:
    """The ends of the paths of those targets that are in `modules` where these name them exactly, else the paths.

    None where ranks differ. `patterns`: whether a regular expression would do, too.
    """
    wanted = {name: targets[name] for name in modules if name in targets}
    if not wanted:
        return ()
    short = tuple(sorted({ending(name) for name in wanted}))
    for names in (_ends(short, modules) if patterns else short, tuple(sorted(wanted))):
        if resolve_targets(dataclasses.replace(lora, targets=names), modules) == wanted:
            return names
    return None


def _ends(suffixes: tuple[str, ...], modules: Sequence[str]) -> str | tuple[str, ...]:
    """What matches all modules that end so: in a part of a larger model, only those in it."""
    if not any(name.startswith(f"{WRAPPED}.") for name in modules):
        return suffixes
    return rf"{re.escape(WRAPPED)}\.(.*\.)?({'|'.join(suffixes)})"


def _readable(*patterns: Mapping[str, float]) -> bool:
    """Whether reading the file again would take them; a config may hold others, such as lookaheads."""
    try:
        for keys in patterns:
            check_patterns(whole_paths(keys))
    except (ValueError, NotImplementedError):
        return False
    return True


def _number(alpha: float) -> float | int:
    """PEFT writes whole alphas as integers."""
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha
