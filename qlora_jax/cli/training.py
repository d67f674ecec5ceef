"""One training run from its configuration to its report."""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qlora_jax import kernels
from qlora_jax.cli.memory_bars import memory_bars
from qlora_jax.cli.out_of_memory import explains_out_of_memory, warn_if_too_large
from qlora_jax.cli.samples import answer, exact_match, expected, shown_prompt
from qlora_jax.cli.sizes import size
from qlora_jax.data import Encoded, check_vocabulary, load_tokenizer
from qlora_jax.generate import Generator
from qlora_jax.io.hf import read_config
from qlora_jax.io.peft import write_adapter
from qlora_jax.io.save import write_model
from qlora_jax.models.adapters import adapter_count
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.models.host_table import with_table_on_device
from qlora_jax.models.parameters import count_parameters
from qlora_jax.train.config import Config
from qlora_jax.train.dataset import Dataset, prepare, random_tokens
from qlora_jax.train.loop import Interrupted, Loop
from qlora_jax.train.metrics import read_rows
from qlora_jax.train.progress import memory_in_use, peak_memory
from qlora_jax.train.report import Sample, write_report
from qlora_jax.train.run_folder import (
    SUMMARY,
    check_run_folder,
    check_same_base,
    explains_full_disk,
    record_run,
    start_step,
    write_summary,
)
from qlora_jax.train.setup import Trainer, base_folder, check_length, lora_config, make_trainer, recorded_quantization

BEFORE = "samples_before.json"


def train(config: Config) -> int:
    """Runs (or continues) the run of `config.output_dir`; returns the exit code.

    Everything that can be wrong with the input is checked before the run folder is written.
    """
    with kernels.using(config.model.kernels):
        kernels.available(DTYPES[config.model.dtype])
        return _train(config)


def _train(config: Config) -> int:
    folder, start = check_run_folder(config), start_step(config)
    source = base_folder(config)
    geometry = read_config(source or Path(config.model.geometry))
    check_length(config, geometry.max_position)
    tokenizer = None if source is None else load_tokenizer(str(source))
    dataset = _dataset(config, tokenizer, geometry)
    steps = config.train.steps or math.ceil((config.train.epochs or 1) * len(dataset.batches))
    warn_if_too_large(config, geometry)
    held_before = peak_memory() or 0
    with explains_out_of_memory(config, geometry):
        trainer = make_trainer(config, source, steps)
        if start:
            check_same_base(config, start, trainer.loaded.content_hash)
        _say(f"{config.method}: {_trainable(trainer, geometry)}; {steps} steps; {memory_in_use()}")
        with explains_full_disk(folder):
            record_run(config)
            loop = Loop(trainer, dataset, folder, steps, _exact_match(config, dataset, tokenizer))
            code = _run(config, folder, loop, geometry, tokenizer, source)
            # A run that was complete already compiles nothing and keeps the figures that it has.
            if code == 0 and (loop.compiled_bytes or not (folder / SUMMARY).exists()):
                write_summary(folder, summary(trainer, geometry, loop, held_before))
            return code


def _run(config: Config, folder: Path, loop: Loop, geometry: ModelConfig, tokenizer, source: Path | None) -> int:
    """Trains, and writes what the run gives; returns the exit code."""
    trainer, dataset = loop.trainer, loop.dataset
    before = _samples_before(config, folder, trainer, dataset, tokenizer, loop)
    try:
        loop.run()
    except Interrupted as stop:
        _say(str(stop))
        return 128 + stop.signal
    finally:
        loop.checkpoints.wait()  # no error may cut off the checkpoint that is being written
    _save_result(config, folder, trainer, source)
    samples = _samples(config, trainer, dataset, tokenizer, before)
    _report(config, folder, loop, trainer, geometry, samples)
    return 0


def _before_and_after(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each figure of the evaluations: the untrained model's and the trained one's."""
    evaluations = [row for row in rows if "eval_loss" in row]
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    return [f"{name}: {first[name]:.4f} before, {last[name]:.4f} after" for name in last if name != "step"]


def _dataset(config: Config, tokenizer, geometry: ModelConfig) -> Dataset:
    if tokenizer is None:
        _say("model.weights=random without a tokenizer: training on random tokens, for speed and memory only")
        return random_tokens(config, geometry.vocab_size)
    check_vocabulary(tokenizer, geometry.vocab_size)
    return prepare(config, tokenizer)


def _generator(trainer: Trainer, tokenizer) -> Generator:
    parts = trainer.parts
    base = with_table_on_device(parts.base)
    return Generator(parts.graphdef, parts.adapters, base, stop_ids=[tokenizer.eos_token_id])


def _exact_match(config: Config, dataset: Dataset, tokenizer):
    if not config.data.exact_match or not dataset.eval_documents:
        return None

    def metrics(trainer: Trainer) -> dict[str, float]:
        answers = answer(_generator(trainer, tokenizer), tokenizer, dataset.eval_documents)
        return {"exact_match": exact_match(answers, dataset.eval_documents, tokenizer)}

    return metrics


def _shown(config: Config, dataset: Dataset) -> list[Encoded]:
    """The documents whose answers the report shows: spread over the evaluation rows."""
    documents, count = dataset.eval_documents, config.data.samples
    count = min(count, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]


def _samples_before(config, folder: Path, trainer, dataset, tokenizer, loop: Loop) -> list[str]:
    """The untrained model's answers, kept in the run folder for a run that is continued."""
    record = folder / BEFORE
    if loop.checkpoints.steps:
        return json.loads(record.read_text()) if record.exists() else []
    loop.evaluate_before()
    answers = answer(_generator(trainer, tokenizer), tokenizer, _shown(config, dataset)) if tokenizer else []
    record.write_text(json.dumps(answers))
    return answers


def _samples(config: Config, trainer: Trainer, dataset: Dataset, tokenizer, before: list[str]) -> list[Sample]:
    documents = _shown(config, dataset)
    if tokenizer is None or not documents:
        return []
    after = answer(_generator(trainer, tokenizer), tokenizer, documents)
    return [
        Sample(prompt=shown_prompt(tokenizer, d), before=b, after=a, expected=expected(tokenizer, d))
        for d, b, a in zip(documents, before or [""] * len(documents), after, strict=True)
    ]


def _save_result(config: Config, folder: Path, trainer: Trainer, source: Path | None) -> None:
    model = trainer.parts.merge()
    if config.method == "full":
        write_model(model, folder / "model", source)
        return
    write_adapter(
        folder / "adapter",
        model,
        lora_config(config),
        trainer.targets,
        base=config.model.path,
        base_hash=trainer.loaded.content_hash,
        extra=recorded_quantization(config),
    )


def _report(config: Config, folder: Path, loop: Loop, trainer: Trainer, geometry: ModelConfig, samples) -> None:
    rows, compiled = read_rows(folder / "metrics.jsonl"), loop.compiled_bytes
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    facts = {
        "Method": config.method,
        "Trainable parameters": _trainable(trainer, geometry),
        "Tokens per second, median": f"{statistics.median(speeds):,.0f}" if speeds else "no step was logged",
        "Compiled memory of the train step": size(compiled) if compiled else "the run was complete already",
        "Memory at the end": memory_in_use(),
        "Base content hash": trainer.loaded.content_hash,
    }
    memory = memory_bars(config, geometry)
    page = write_report(folder, rows=rows, samples=samples, config=config, facts=facts, memory=memory)
    _say("\n".join([*_before_and_after(rows), f"done: {page}"]))


def summary(trainer: Trainer, geometry: ModelConfig, loop: Loop, held_before: int) -> dict[str, Any]:
    """What a finished run's summary.json says. The allocator's peak is this run's only where it rose during it."""
    trained, total = _counts(trainer, geometry)
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


def _counts(trainer: Trainer, geometry: ModelConfig) -> tuple[int, int]:
    """(trained parameters, all of the base)."""
    total = count_parameters(geometry)
    return total if trainer.config.method == "full" else adapter_count(geometry, trainer.targets), total


def _trainable(trainer: Trainer, geometry: ModelConfig) -> str:
    count, total = _counts(trainer, geometry)
    return f"{count:,} of {total:,} parameters trained ({count / total:.2%})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
