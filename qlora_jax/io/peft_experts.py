"""Adapters of experts in PEFT's files: under which names, and in which layout.

PEFT wraps a layer's module `experts` once for each projection that is adapted. gate_up_proj's wrapper is then the inner
one, whose keys have `base_layer`; where one projection alone is adapted, its wrapper is the only one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.lora import Target
from qlora_jax.lora.experts import from_peft, to_peft
from qlora_jax.lora.low_rank import Pair
from qlora_jax.lora.targets import EXPERTS, matches

INNER = ".base_layer"
GATE_UP, DOWN = PROJECTIONS = ("gate_up_proj", "down_proj")
# The names of an expert's layers in transformers 4.
FORMER = ("gate_proj", "up_proj", "down_proj")
WEIGHT, ROUTERS = ".weight", ("gate", "router", "")


def in_file(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of modules by the paths that PEFT has for their wrappers, those of experts flat."""
    found = {}
    for module, parts in weights.items():
        if EXPERTS not in module:
            found[module] = parts
            continue
        experts, _, projection = module.rpartition(".")
        inner = projection == GATE_UP and f"{experts}.{DOWN}" in weights
        found[f"{experts}{INNER}" if inner else experts] = to_peft(parts)
    return found


def by_module(file: Path, held: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
    """What a file holds by wrappers by the paths of modules.

    Args:
      parameters: target_parameters, which say what a wrapper that stands alone is for.

    Raises:
      ValueError: a wrapper that could be of either projection, or of none.
    """
    asked = [as_target(name) for name in parameters]
    found = {}
    for path, parts in held.items():
        experts = path.removesuffix(INNER)
        if not f"{experts}.".endswith(EXPERTS):
            found[path] = parts
            continue
        if path != experts:
            projection = GATE_UP
        elif f"{experts}{INNER}" in held:
            projection = DOWN
        else:
            projection = _only(file, experts, asked)
        found[f"{experts}.{projection}"] = parts
    return found


def _only(file: Path, experts: str, asked: Sequence[str]) -> str:
    found = [one for one in PROJECTIONS if any(matches(target, f"{experts}.{one}") for target in asked)]
    if len(found) != 1:
        raise ValueError(
            f"{file} holds one adapter of {experts!r}, for which target_parameters names "
            f"{' and '.join(found) or 'none'} of {' and '.join(PROJECTIONS)}: save the adapter again"
        )
    return found[0]


def unflattened(file: Path, weights: Mapping[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
    """The same with the experts' A `[E, r, K]` and B `[E, N, r]`: by its rank an array says how many experts it has.

    Raises:
      ValueError: arrays that no number of experts has.
    """
    return {
        name: _unflattened(file, name, parts, targets[name].rank) if EXPERTS in name and name in targets else parts
        for name, parts in weights.items()
    }


def _unflattened(file: Path, name: str, flat: Pair, rank: int) -> Pair:
    if len(flat.A) % rank or flat.B.shape[1] != len(flat.A):
        raise ValueError(
            f"{file}: {name!r} has A {flat.A.shape} and B {flat.B.shape}, expected [experts·{rank}, in] and "
            f"[out, {rank}·experts] of rank {rank}: save the adapter again"
        )
    return from_peft(flat, len(flat.A) // rank)


def parted(modules: Sequence[str]) -> tuple[list[str], list[str]]:
    """What PEFT's file names as modules, and what it names as parameters.

    In a model with experts, PEFT takes linear layers of FORMER names for experts' (it converts adapters made with
    transformers 4 where it finds such names in target_modules). Named by their weights they are themselves, and their
    arrays are the same.
    """
    mixture = any(EXPERTS in name for name in modules)
    found: tuple[list[str], list[str]] = [], []
    for name in modules:
        found[EXPERTS in name or (mixture and name.rpartition(".")[2] in FORMER)].append(name)
    return found


def as_parameter(target: str) -> str:
    """A target's name in target_parameters: experts are parameters themselves."""
    return target if EXPERTS in f".{target}" else f"{target}{WEIGHT}"


def as_target(parameter: str) -> str:
    """A name in target_parameters as lora.targets has it: PEFT leaves "experts" out where it makes names itself."""
    if parameter.endswith(WEIGHT):
        return parameter.removesuffix(WEIGHT)
    return parameter if EXPERTS in f".{parameter}" else f"{EXPERTS.strip('.')}.{parameter}"


def with_parameters(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern of whole paths that also says the same of what is named by its weight."""
    paths = {f"{path}{WEIGHT}": value for path, value in pattern.items() if path.rpartition(".")[2] in FORMER}
    return {**pattern, **paths}


def check_parameters(file: Path, parameters: Sequence[str]) -> None:
    """Refuses target_parameters that are no linear layer's weight and no projection of experts, such as routers'.

    Raises:
      NotImplementedError: with the file, the name and what to do.
    """
    for name in parameters:
        module, _, last = name.rpartition(".")
        if last not in PROJECTIONS and (last != WEIGHT[1:] or module.rpartition(".")[2] in ROUTERS):
            raise NotImplementedError(
                f"{file}: target_parameters names {name!r}, a router or another array; of a mixture only the experts' "
                f"{' and '.join(PROJECTIONS)} are supported: train without it, or merge the adapter with PEFT"
            )
