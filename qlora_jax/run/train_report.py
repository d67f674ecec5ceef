"""What a run says of itself at its end: its page, its summary, and lines for whoever watches."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qlora_jax.config import Config
from qlora_jax.device.facts import memory_in_use, peak_memory
from qlora_jax.models.adapters import adapter_count
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.table import count_parameters
from qlora_jax.report.run import write_report
from qlora_jax.report.words import size
from qlora_jax.run.memory_bars import memory_bars
from qlora_jax.training.loop import Loop
from qlora_jax.training.metrics import read_rows
from qlora_jax.training.run_folder import read_changes
from qlora_jax.training.setup import Trainer


def report(config: Config, folder: Path, loop: Loop, trainer: Trainer, model_config: ModelConfig, samples) -> None:
    """Writes report.html, and says where it is and what training has changed."""
    rows, compiled = read_rows(folder / "metrics.jsonl"), loop.compiled_bytes
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    facts = {
        "Method": config.method,
        "Trainable parameters": trainable(trainer, model_config),
        "Tokens per second, median": f"{statistics.median(speeds):,.0f}" if speeds else "no step was logged",
        "Compiled memory of the train step": size(compiled) if compiled else "the run was complete already",
        "Memory at the end": memory_in_use(),
        "Base content hash": trainer.loaded.content_hash,
    }
    facts |= {f"Changed at step {one['step']}": "; ".join(one["changed"]) for one in read_changes(folder)}
    memory = memory_bars(config, model_config)
    page = write_report(folder, rows=rows, samples=samples, config=config, facts=facts, memory=memory)
    loop.observer.note("\n".join([*before_and_after(rows), f"done: {page}"]))


def summary(trainer: Trainer, model_config: ModelConfig, loop: Loop, held_before: int) -> dict[str, Any]:
    """What a finished run's summary.json says. The allocator's peak is this run's only where it rose during it."""
    trained, total = counts(trainer, model_config)
    peak, device = peak_memory(), jax.local_devices()[0]
    return {
        "method": trainer.config.method,
        "steps": loop.steps,
        "trainable": trained,
        "parameters": total,
        "compiled_bytes": loop.compiled_bytes,
        "device_peak_bytes": peak if peak and peak > held_before else None,
        "device": device.device_kind,
        "platform": device.platform,
        "base_hash": trainer.loaded.content_hash,
    }


def counts(trainer: Trainer, model_config: ModelConfig) -> tuple[int, int]:
    """(trained parameters, all of the base)."""
    total = count_parameters(model_config)
    return total if trainer.config.method == "full" else adapter_count(model_config, trainer.targets), total


def trainable(trainer: Trainer, model_config: ModelConfig) -> str:
    count, total = counts(trainer, model_config)
    return f"{count:,} of {total:,} parameters trained ({count / total:.2%})"


def before_and_after(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each figure of the evaluations: the untrained model's and the trained one's."""
    evaluations = [row for row in rows if "eval_loss" in row]
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    both = [name for name in last if name != "step" and None not in (first.get(name), last[name])]
    return [f"{name}: {first[name]:.4f} before, {last[name]:.4f} after" for name in both]
