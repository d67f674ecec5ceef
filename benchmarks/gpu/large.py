"""A 65B model's train step on one card of 48 GB: random packed weights, real memory."""

import dataclasses
from pathlib import Path

from benchmarks.gpu.context import GB, Context
from benchmarks.gpu.sizes import ROOT
from benchmarks.gpu.timing import median_seconds, memory_stat, peak_bytes
from benchmarks.gpu.train import Step, record_memory, require_exact
from qlora_jax.config import Config, load_config

NAME = "train step, 65B"
CARD = 48.0
STEPS = 2


def make_config(context: Context) -> Config:
    """configs/65b.py with random weights; a smoke run trains its tiny geometry."""
    config = load_config(ROOT / "configs" / "65b.py", ["--config.model.weights=random", *context.sizes.large])
    if context.sizes.smoke:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, geometry=str(context.sizes.geometry))
        )
    return config


def record_fit(context: Context) -> None:
    """The allocator's peak beside 48 GB."""
    measured, name, bar = peak_bytes(), f"{NAME}: peak memory beside {CARD:.0f} GB", ("<=", 1.0)
    if measured is None:
        context.missing(name, "GB", "not measured: this backend does not count", reference=CARD, bar=bar)
    else:
        context.row(name, measured / GB, "GB", reference=CARD, bar=bar)


def run(context: Context) -> None:
    """Compiles first: the prediction says whether the card can hold it, before anything is allocated."""
    require_exact(context)
    config = make_config(context)
    step = Step(config)
    limit = memory_stat("bytes_limit")
    if limit is not None and step.predicted > limit:
        note = f"does not fit: needs {step.predicted / GB:.1f} GB, this card gives {limit / GB:.1f} GB"
        context.missing(NAME, "s", note)
        return
    step.allocate()
    loss = step()
    seconds = median_seconds(step, STEPS)
    section = config.train
    tokens = section.batch_size * section.grad_accum * section.seq_len
    note = f"{Path(config.model.geometry).stem}, {tokens} tokens, {tokens / seconds:.4g} tokens/s, loss {loss:.4g}"
    context.row(NAME, seconds, "s", note=f"{note}, compiled in {step.compile_seconds:.0f} s")
    record_memory(context, NAME, step.predicted)
    record_fit(context)
