"""What a plan leaves room for, and what to change where it does not fit."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import get_args, get_type_hints

from qlora_jax.config import Config, QuantSection, apply_overrides
from qlora_jax.memory.plan import Planner, plan
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.storing import check_storage
from qlora_jax.training.setup import embedding_on_host, storage_rules

# Nobody runs more rows at once: with this many the search has gone far enough.
MOST_ROWS = 1 << 16
# The tiles of attention and of the matmuls are multiples of it.
LENGTH_STEP = 64
SMALL_CHUNK, SMALL_MLP_CHUNK, SMALL_VOCAB_CHUNK = 64, 1024, 4096


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to a configuration.

    Attributes:
      overrides: as a command line takes them, without `--config.`: `("train.remat=full",)`.
      saves: bytes of the peak, if nothing else changes.
      peak: bytes with this change alone. peak_together: with this and all before it.
    """

    overrides: tuple[str, ...]
    saves: int
    peak: int
    peak_together: int


def changes(config: Config, model_config: ModelConfig) -> list[Change]:
    """What saves memory, in the order to try it.

    First what leaves the result as it is (fewer rows at once, more computed again), then how the base is stored, then
    what changes the training itself. Changes that save nothing, or that this model cannot have, are left out.
    """
    before = plan(config, model_config).peak
    found: list[Change] = []
    so_far: dict[str, str] = {}
    for overrides in candidates(config):
        # What contradicts a change before it is left out, too.
        if not can_be_stored(
            config, (*(f"{name}={value}" for name, value in so_far.items()), *overrides), model_config
        ):
            continue
        peak = plan(changed(config, overrides), model_config).peak
        if peak < before:
            # Of two values for one field, the first stays.
            so_far = dict(override.split("=") for override in overrides) | so_far
            both = plan(changed(config, tuple("=".join(pair) for pair in so_far.items())), model_config).peak
            found.append(Change(overrides, before - peak, peak, both))
    return found


def can_be_stored(config: Config, overrides: tuple[str, ...], model_config: ModelConfig) -> bool:
    """Whether a model of this geometry can have its base stored as the changed configuration says."""
    try:
        new = changed(config, overrides)
        check_storage(model_config, storage_rules(new), embedding_on_host(new))
    except ValueError:
        return False
    return True


def changed(config: Config, overrides: tuple[str, ...]) -> Config:
    return apply_overrides(config, [f"--config.{override}" for override in overrides])


def candidates(config: Config) -> Iterator[tuple[str, ...]]:
    """The changes that can be made to a configuration, whatever they save."""
    train = config.train
    if train.batch_size > 1:
        yield ("train.batch_size=1", f"train.grad_accum={train.batch_size * train.grad_accum}")
    if train.remat in ("none", "dots"):
        yield ("train.remat=full",)
    if train.remat == "full":
        yield ("train.remat=offload",)
    if config.optim.offload == "none":
        yield ("optim.offload=host",)
    if config.method != "full" and config.model.embedding == "device":
        yield ("model.embedding=host",)
    if train.mlp_chunk == 0 or train.mlp_chunk > SMALL_MLP_CHUNK:
        yield (f"train.mlp_chunk={SMALL_MLP_CHUNK}",)
    if train.loss_chunk > SMALL_CHUNK:
        yield (f"train.loss_chunk={SMALL_CHUNK}",)
    if train.vocab_chunk == 0 or train.vocab_chunk > SMALL_VOCAB_CHUNK:
        yield (f"train.vocab_chunk={SMALL_VOCAB_CHUNK}",)
    if config.method == "qlora":
        yield from _storage(config)
    else:
        yield ("method=qlora",)
    if config.optim.moments == "fp32":
        yield ("optim.moments=bf16",)
    if config.method != "full" and config.optim.gradients == "fp32":
        yield ("optim.gradients=bf16",)
    if config.method != "full" and config.lora.rank > 1:
        yield (f"lora.rank={config.lora.rank // 2}",)
    if train.seq_len > LENGTH_STEP:
        yield (f"train.seq_len={train.seq_len // 2}",)


def _storage(config: Config) -> Iterator[tuple[str, ...]]:
    """Every smaller way to store a part of the base that the configuration knows and does not use."""
    if not config.quant.double:
        yield ("quant.double=true",)
    kinds = get_type_hints(QuantSection)
    for name in ("lm_head", "embedding"):
        if getattr(config.quant, name) == "none":
            yield from ((f"quant.{name}={choice}",) for choice in get_args(kinds[name]) if choice != "none")


def largest_batch(planner: Planner, budget: int) -> int:
    """The largest `train.batch_size` whose peak is within `budget` bytes; 0 where one row is too much."""
    seq_len = planner.config.train.seq_len
    return largest(lambda rows: planner.at(rows, seq_len).peak, budget, MOST_ROWS)


def longest_sequence(planner: Planner, budget: int) -> int:
    """The longest `train.seq_len` within `budget` bytes and the model's positions, a multiple of 64 but for that end.

    The configuration's own length counts where it fits. 0 where not even 64 tokens do.
    """
    limit = planner.config.model.max_position or planner.model_config.max_position
    rows = planner.config.train.batch_size

    def length(units: int) -> int:
        return min(units * LENGTH_STEP, limit)

    def peak(tokens: int) -> int:
        return planner.at(rows, tokens).peak

    own = planner.config.train.seq_len
    units = largest(lambda n: peak(length(n)), budget, -(-limit // LENGTH_STEP))
    return max(length(units), own if peak(own) <= budget else 0)


def largest(measure: Callable[[int], int], budget: int, most: int) -> int:
    """The largest n from 1 to `most` with `measure(n)` (growing with n) within the budget; 0 where 1 is beyond it.

    Memory is nearly linear in n, so where a straight line would cross the budget is tried in turn with the middle.
    """
    ends = {n: measure(n) for n in {1, most}}
    if ends[1] > budget:
        return 0
    if ends[most] <= budget:
        return most
    low, high, halve = 1, most, False
    while high - low > 1:
        crossing = low + (budget - ends[low]) * (high - low) // max(ends[high] - ends[low], 1)
        n = (low + high) // 2 if halve else min(max(crossing, low + 1), high - 1)
        ends[n] = measure(n)
        low, high = (n, high) if ends[n] <= budget else (low, n)
        halve = not halve
    return low
