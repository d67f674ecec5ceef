"""An adapter on its own, as its folder holds it, and whether it goes onto a base."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_jax.config import LoraSection
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.identity import RECORD, SAMPLE, BaseHash
from qlora_jax.lora import Target, resolve_targets
from qlora_jax.lora.kinds import KINDS, Kind
from qlora_jax.lora.targets import OUTPUT_LAYER, by_paths
from qlora_jax.models.adapters import shape_of
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.names import ALONE, WRAPPED
from qlora_jax.models.params import Param
from qlora_jax.models.table import adaptable, linear_modules


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter on its own.

    Attributes:
      lora: how it was made; `lora.targets` as its folder says it.
      weights: each adapted module's arrays by path, such as A `[r, K]` and B `[N, r]` (of experts A `[E, r, K]` and B
        `[E, N, r]`): float32, bfloat16 or float16, finite.
      base: the model that it was trained on, a Hub name or a path; None where the folder does not say.
      base_hash: that model's content hash; None in folders that PEFT wrote.
      extra: what else was recorded beside it, such as how the base was quantized.
      chat_template: those in its folder, which it was trained with; None leaves the base's.
    """

    lora: LoraSection
    weights: Mapping[str, Any]
    base: str | None
    base_hash: str | None
    extra: Mapping[str, Any]
    chat_template: Templates | None = None

    @functools.cached_property
    def targets(self) -> dict[str, Target]:
        """Rank and scale of each adapted module."""
        return resolve_targets(self.lora, list(self.weights))

    @property
    def kind(self) -> Kind:
        """What computes it."""
        return KINDS[self.lora.variant]

    def on(self, param: Param) -> tuple[list[Any], np.ndarray]:
        """Of each module that a parameter stacks the arrays, None where it is not adapted, and the scale.

        The scales are float32 `[L]`, 0 where there is no adapter.
        """
        modules = param.modules
        scale = [self.targets[name].scale if name in self.targets else 0 for name in modules]
        return [self.weights.get(name) for name in modules], np.array(scale, np.float32)


def check_base(adapter: Adapter, base_hash: str | None) -> None:
    """Refuses an adapter that records another base than the one with this content hash. Raises ValueError.

    The same base in another 16- or 32-bit dtype is no other one, nor is the original of a base in 4 bits.
    """
    sample = adapter.extra.get(SAMPLE)
    if isinstance(base_hash, BaseHash) and isinstance(sample, str) and base_hash.holds(sample):
        return
    if None not in (adapter.base_hash, base_hash) and adapter.base_hash != base_hash:
        raise ValueError(
            f"adapter for another base: it was trained on {adapter.base!r} with content hash "
            f"{adapter.base_hash}, this base has {base_hash}: give the base it was trained on (or delete its "
            f"{RECORD} to skip this check)"
        )


def fitted(adapter: Adapter, config: ModelConfig) -> Adapter:
    """The adapter with its modules named as this model's are.

    A model of images and text is two classes in transformers, of which adapters have different names: that of both
    parts (`model.language_model.…`), and that of the language part alone (`model.…`).

    Of a model whose embedding is its output layer, too, the output layer alone may be adapted, as in PEFT.

    Raises:
      ValueError: an adapter whose modules or shapes are not the model's.
    """
    adapter = _renamed(adapter, config.names.decoder)
    _check_fits(adapter, config)
    return adapter


def _renamed(adapter: Adapter, decoder: str) -> Adapter:
    other = WRAPPED if decoder == ALONE else ALONE
    here, there = f"{decoder}.", f"{other}."

    def name(module: str) -> str:
        return here + module.removeprefix(there) if module.startswith(there) else module

    theirs = [module for module in adapter.weights if module.startswith(f"{other}.layers.")]
    if not theirs:
        return adapter
    targets = {name(module): target for module, target in adapter.targets.items()}
    weights = {name(module): parts for module, parts in adapter.weights.items()}
    return dataclasses.replace(adapter, lora=by_paths(adapter.lora, targets), weights=weights)


def _check_fits(adapter: Adapter, config: ModelConfig) -> None:
    modules, targets = linear_modules(config), adapter.targets
    params = adaptable(dataclasses.replace(config, tie_embeddings=False)).values()
    owners = {module: param for param in params for module in param.modules}
    for name, parts in adapter.weights.items():
        if name not in modules and name != OUTPUT_LAYER:
            why = " (it was trained on the model without its output layer)" if f"model.{name}" in modules else ""
            raise ValueError(
                f"the adapter has weights for {name!r}{why}, which this {config.family} model of "
                f"{config.num_layers} layers lacks: give the adapter's own base"
            )
        shape = shape_of(owners[name], targets[name].rank)
        misfit = adapter.kind.of(shape.experts).check_shapes(parts, shape)
        if misfit:
            array, got, want = misfit
            raise ValueError(f"{array} of {name!r} is {got}, this model needs {want}: give the adapter's own base")
    resolved = resolve_targets(adapter.lora, sorted({*modules, *adapter.weights}))
    absent = sorted(resolved.keys() - adapter.weights.keys())
    if absent:
        raise ValueError(
            f"the adapter's target_modules cover {absent[0]!r}, for which it has no weights: save the adapter again"
        )
