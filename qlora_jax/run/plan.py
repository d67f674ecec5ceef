"""One plan: all methods by arithmetic, the chosen one by XLA's compiler where it is installed, and a verdict."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from qlora_jax import kernels
from qlora_jax.config import Config
from qlora_jax.device.facts import device_bytes
from qlora_jax.io.hf import read_config
from qlora_jax.memory.advice import Change, changes, largest_batch, longest_sequence
from qlora_jax.memory.compile import CompilerMissing, compile_for
from qlora_jax.memory.plan import Breakdown, Planner
from qlora_jax.memory.targets import GPUS, Card, find_card
from qlora_jax.memory.train_step import abstract_train_step
from qlora_jax.models.config import ModelConfig
from qlora_jax.run.observing import Progress, observer_of
from qlora_jax.training.observer import Observer
from qlora_jax.training.setup import check_length, for_geometry, with_method

METHODS: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora", "qlora")
# What a CUDA context, its libraries' handles and the loaded kernels take beside JAX's arrays.
CONTEXT = 700_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a plan found out; sizes in bytes.

    Attributes:
      breakdowns: the arithmetic of each of METHODS.
      compiled: the peak of the chosen method's step as XLA's compiler states it, or None.
      how: where the peak comes from, in words.
      largest_batch, longest_sequence: with everything else as it is; 0 where even the smallest is too much.
      changes: what saves memory, in the order to try it.
    """

    config: Config
    model_config: ModelConfig
    card: Card
    breakdowns: Mapping[Literal["full", "lora", "qlora"], Breakdown]
    compiled: int | None
    how: str
    largest_batch: int
    longest_sequence: int
    changes: tuple[Change, ...]

    @property
    def breakdown(self) -> Breakdown:
        return self.breakdowns[self.config.method]

    @property
    def peak(self) -> int:
        return self.breakdown.peak if self.compiled is None else self.compiled

    def scaled(self, peak: int) -> int:
        """An arithmetic peak of the chosen method, with what the compiler found to be more or less in proportion."""
        return round(peak * self.peak / self.breakdown.peak)

    def fits(self, peak: int) -> bool:
        """Whether a step of this peak fits the card beside the CUDA context."""
        return peak + CONTEXT <= self.card.capacity

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints. The parts in `breakdown` add up to `arithmetic_peak_bytes`."""
        return {
            "gpu": self.card.name,
            "compiled_as": self.card.compiled_as if self.compiled is not None else None,
            "method": self.config.method,
            "peak_bytes": self.peak,
            "compiled": self.compiled is not None,
            "how": self.how,
            "arithmetic_peak_bytes": self.breakdown.peak,
            "breakdown": self.breakdown.parts(),
            "temporaries": {"layer": self.breakdown.layer, "logits_chunk": self.breakdown.logits},
            "host_bytes": self.breakdown.host,
            "fits": self.fits(self.peak),
            "capacity_bytes": self.card.capacity,
            "context_bytes": CONTEXT,
            "largest_batch": self.largest_batch,
            "longest_sequence": self.longest_sequence,
            "changes": [self._change(change) for change in self.changes],
            "methods": {
                method: {"peak_bytes": one.peak, "fits": self.fits(one.peak), "breakdown": one.parts()}
                for method, one in self.breakdowns.items()
            },
        }

    def _change(self, change: Change) -> dict[str, Any]:
        overrides = [f"--config.{override}" for override in change.overrides]
        return {
            "overrides": overrides,
            "saves_bytes": change.saves,
            "fits": self.fits(self.scaled(change.peak)),
            "fits_with_those_before": self.fits(self.scaled(change.peak_together)),
        }


def plan(config: Config, gpu: str | Card, *, progress: Progress = False) -> Report:
    """How much memory a train step of `config` needs, and whether it fits a GPU, which need not be there.

    The searches use the arithmetic, in proportion to what the compiler found: so the configuration's own batch and
    length are among those that fit exactly if it fits.

    Args:
      gpu: a card, its name such as "rtx4090", or a size such as "48GB".
      progress: as in `train`.

    Raises:
      FileNotFoundError: the model's geometry is not on this machine.
      ValueError: no such card, or a configuration that the model cannot have.
    """
    card = find_card(gpu) if isinstance(gpu, str) else gpu
    config = with_geometry(config)
    model_config = read_config(Path(config.model.geometry))
    config = for_geometry(config, model_config)
    check_length(config, model_config.max_position)
    planners = {m: Planner(with_method(config, m), model_config) for m in METHODS}
    planner = planners[config.method]
    section = config.train
    breakdowns = {m: one.at(section.batch_size, section.seq_len) for m, one in planners.items()}
    compiled, how = compiled_peak(config, card, observer_of(progress))
    peak = breakdowns[config.method].peak
    budget = math.floor((card.capacity - CONTEXT) * peak / (compiled or peak))
    return Report(
        config=config,
        model_config=model_config,
        card=card,
        breakdowns=breakdowns,
        compiled=compiled,
        how=how,
        largest_batch=largest_batch(planner, budget),
        longest_sequence=longest_sequence(planner, budget),
        changes=tuple(changes(config, model_config)),
    )


def with_geometry(config: Config) -> Config:
    """The configuration with `model.geometry` naming the config.json that its run would use.

    Raises:
      FileNotFoundError: the model is neither a local folder nor described by a file.
    """
    model = config.model
    if Path(model.path).is_dir() and model.path and not (model.weights == "random" and model.geometry):
        return dataclasses.replace(config, model=dataclasses.replace(model, geometry=model.path))
    if model.geometry:
        return config
    raise FileNotFoundError(
        f"model.path={model.path!r} is no local folder, and model.geometry is not set: a plan reads the model's sizes "
        "from its config.json; name one with --config.model.geometry=FILE (configs/geometry/ has some), or pass a "
        "downloaded model's folder as --config.model.path=DIR"
    )


def compiled_peak(config: Config, card: Card, observer: Observer) -> tuple[int | None, str]:
    """(the peak that XLA states for the step on this card, or None where it cannot say; that in words)."""
    name = GPUS[card.compiled_as].name
    target = f"{name} (standing in for {card.name})" if card.stands_in else name
    observer.note(f"compiling the {config.method} train step for {target} …")
    try:
        with kernels.using(config.model.kernels):
            step, arguments = abstract_train_step(config)
            peak = device_bytes(compile_for(step, arguments, card.compiled_as))["peak"]
    except CompilerMissing as error:
        how = f"arithmetic, not compiled: {error}"
    except jax.errors.JaxRuntimeError as error:
        how = f"arithmetic, not compiled: XLA does not compile it for {name}: {str(error).splitlines()[0]}"
    else:
        return peak, f"compiled by XLA for {target}"
    observer.note(how)
    return None, how
