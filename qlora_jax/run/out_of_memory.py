"""A GPU that is too small for a run: a warning before it starts, and words for the error if it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from qlora_jax.config import Config, may_change
from qlora_jax.device.facts import device_memory
from qlora_jax.memory.advice import changes
from qlora_jax.memory.plan import Breakdown, plan
from qlora_jax.models.config import ModelConfig
from qlora_jax.report.words import size
from qlora_jax.training.observer import Observer
from qlora_jax.training.run_folder import RECORD

SHOWN = 3


class OutOfMemory(RuntimeError):
    """The device has no memory left. The message says what takes it and what to change."""


def warn_if_too_large(config: Config, model_config: ModelConfig, observer: Observer) -> None:
    """A warning where the run's plan, by arithmetic, exceeds the GPU."""
    limit = device_memory()
    if limit is None:
        return
    peak = plan(config, model_config).peak
    if peak > limit:
        observer.warn(
            f"the train step needs about {size(peak)}, and JAX may use {size(limit)} of this GPU; "
            f"{_next_step(config, model_config)} (scripts/plan.py says more)"
        )


@contextmanager
def explains_out_of_memory(config: Config, model_config: ModelConfig) -> Iterator[None]:
    """Turns JAX's RESOURCE_EXHAUSTED in the block into one OutOfMemory that says how to go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(_explanation(config, model_config)) from error


def _explanation(config: Config, model_config: ModelConfig) -> str:
    need, limit = plan(config, model_config), device_memory()
    offer = "" if limit is None else f" of the {size(limit)} that JAX may use"
    return (
        f"out of memory on the device: the train step needs about {size(need.peak)}{offer}, most of it for "
        f"{_largest(need)}; {_next_step(config, model_config)}; no checkpoint is lost, and scripts/plan.py shows the "
        "rest"
    )


def _largest(need: Breakdown) -> str:
    parts = sorted(need.parts().items(), key=lambda part: part[1], reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in parts[:SHOWN])


def _next_step(config: Config, model_config: ModelConfig) -> str:
    """What to change first; a run goes on in its folder only with changes that leave the result as it is."""
    found = changes(config, model_config)
    if not found:
        return "nothing in the configuration makes it smaller: use a smaller model or a larger GPU"
    first = found[0]
    overrides = " ".join(f"--config.{override}" for override in first.overrides)
    same = {override.partition("=")[0] for override in first.overrides} <= may_change("free")
    started = (Path(config.output_dir) / RECORD).exists()
    folder = "" if not started else ", which goes on in the same folder" if same else " and a new --config.output_dir"
    return f"next: add {overrides} (saves {size(first.saves)}){folder}"
