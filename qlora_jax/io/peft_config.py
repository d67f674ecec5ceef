"""LoraSection to PEFT's adapter_config.json and back."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.config import LoraSection
from qlora_jax.io.bounded_json import read_object
from qlora_jax.io.peft_types import check_types
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.lora.kinds import KINDS
from qlora_jax.lora.patterns import check_patterns
from qlora_jax.lora.targets import scale_of, whole_paths

CONFIG = "adapter_config.json"
REQUIRED = ("r", "lora_alpha", "target_modules")
# Settings under which A and B alone do not give PEFT's result.
UNSUPPORTED = (
    *("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config"),
)
# Initializations that leave the base model's weights as they were.
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def to_peft(lora: LoraSection, targets: Mapping[str, Target], modules: Sequence[str], base: str) -> dict[str, Any]:
    """adapter_config.json for the adapted modules `targets` of a model whose linear layers are `modules`."""
    exact = _exact(lora, targets, modules)
    return {
        "alpha_pattern": {name: _number(alpha) for name, alpha in exact.alpha_pattern.items()},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(exact.alpha),
        "lora_dropout": exact.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": exact.rank,
        "rank_pattern": dict(exact.rank_pattern),
        "target_modules": list(exact.targets),
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
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(f"{file}: peft_type {reprlib.repr(kind)} is not supported, only 'LORA'")
    absent = [key for key in REQUIRED if settings.get(key) is None]
    if absent:
        raise ValueError(f"{file} lacks {absent[0]!r}: save the adapter again")
    _refuse_unsupported(file, settings)
    check_types(file, settings)
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
    """target_modules, as far as they match any of `modules`; these themselves where another setting narrows it."""
    targets = settings["target_modules"]
    if settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        return tuple(modules)
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    # PEFT ignores a name that matches nothing as long as another does.
    return tuple(t for t in targets if any(f".{name}".endswith(f".{t}") for name in modules))


def _exact(lora: LoraSection, targets: Mapping[str, Target], modules: Sequence[str]) -> LoraSection:
    """`lora` naming exactly `targets`: by the last parts of their paths where these suffice, else by all."""
    # The file's keys are sorted, and the first pattern that matches wins.
    ranks, alphas = dict(sorted(lora.rank_pattern.items())), dict(sorted(lora.alpha_pattern.items()))
    suffixes = tuple(sorted({name.rsplit(".", 1)[-1] for name in targets}))
    paths = tuple(sorted(targets))
    for names in (suffixes, paths) if _readable(ranks, alphas) else ():
        candidate = dataclasses.replace(lora, targets=names, rank_pattern=ranks, alpha_pattern=alphas)
        if resolve_targets(candidate, modules) == targets:
            return candidate
    ranks = {name: targets[name].rank for name in paths}
    alphas = {name: targets[name].scale / scale_of(lora, targets[name].rank, 1.0) for name in paths}
    return dataclasses.replace(lora, targets=paths, rank_pattern=ranks, alpha_pattern=alphas)


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
