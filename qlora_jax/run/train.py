"""One training run from its configuration to its report."""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from qlora_jax import kernels
from qlora_jax.config import Config
from qlora_jax.data import Encoded, limit_vocabulary, load_chat_template, load_tokenizer
from qlora_jax.device.facts import memory_in_use, peak_memory
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.hf import read_config
from qlora_jax.io.peft import write_adapter
from qlora_jax.io.save import write_model
from qlora_jax.models.adapters import adapter_count
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.models.table import count_parameters
from qlora_jax.report.run import Sample, write_report
from qlora_jax.report.words import size
from qlora_jax.run.load import stop_ids_of
from qlora_jax.run.memory_bars import memory_bars
from qlora_jax.run.out_of_memory import explains_out_of_memory, warn_if_too_large
from qlora_jax.run.samples import Answerer
from qlora_jax.training.assumptions import assumptions
from qlora_jax.training.dataset import Dataset, prepare, random_tokens
from qlora_jax.training.lock import RunLock
from qlora_jax.training.loop import Loop
from qlora_jax.training.metrics import read_rows
from qlora_jax.training.run_folder import (
    RECORD,
    SUMMARY,
    begun,
    check_assumptions,
    check_run_folder,
    check_same_base,
    check_same_run,
    enter_run_folder,
    explains_full_disk,
    finished_beyond,
    read_changes,
    record_run,
    start_step,
    write_summary,
)
from qlora_jax.training.setup import (
    Trainer,
    base_folder,
    check_length,
    for_geometry,
    lora_config,
    make_trainer,
    recorded_quantization,
)
from qlora_jax.training.signals import Stopped, StopRequest

BEFORE = "samples_before.json"


def train(config: Config) -> int:
    """Runs (or continues) the run of `config.output_dir`; returns the exit code: 128 + N when signal N stopped it.

    Everything that can be wrong with the input is checked before the run folder is written.
    """

    def choice():
        return kernels.using(config.model.kernels)

    with choice(), StopRequest(around=choice) as stop:
        kernels.available(DTYPES[config.model.dtype])
        folder = check_run_folder(config)
        try:
            with RunLock(folder) as lock:
                return _train(config, folder, lock, stop)
        except Stopped as stopped:
            _say(str(stopped))
            return 128 + stopped.signal


def _train(config: Config, folder: Path, lock: RunLock, stop: StopRequest) -> int:
    source = stop.beside(lambda: base_folder(config))  # which may have to come from the Hub
    geometry = read_config(source or Path(config.model.geometry))
    config = for_geometry(config, geometry)
    check_same_run(config)
    is_begun = (folder / RECORD).exists()
    if is_begun:
        enter_run_folder(lock, config, begun=True)
    start = start_step(config)
    check_length(config, geometry.max_position)
    tokenizer = None if source is None else _tokenizer(config, source)
    chat_template = tokenizer and tokenizer.chat_template
    today = begun(folder)
    dataset = stop.beside(lambda: _dataset(config, tokenizer, geometry, today))
    steps = config.train.steps or math.ceil((config.train.epochs or 1) * len(dataset.batches))
    if finished_beyond(config, steps):
        _say(f"{folder} holds a finished run of more than {steps} steps: it is left as it is")
        return 0
    assumed = assumptions(dataset, tokenizer, steps)
    changed = check_assumptions(config, start, assumed) if start else []
    warn_if_too_large(config, geometry)
    held_before = peak_memory() or 0
    with explains_out_of_memory(config, geometry):
        trainer = stop.beside(lambda: make_trainer(config, source, steps))
        if start:
            check_same_base(config, start, trainer.loaded.content_hash)
        if changed:
            _say(f"going on from step {start} with changes: {'; '.join(changed)}")
        _say(f"{config.method}: {_trainable(trainer, geometry)}; {steps} steps; {memory_in_use()}")
        with explains_full_disk(folder):
            enter_run_folder(lock, config, begun=is_begun)
            record_run(config, chat_template, today, {"step": start, "changed": changed} if changed else None)
            loop = Loop(trainer, dataset, folder, assumed, _exact_match(config, dataset, geometry, tokenizer), stop)
            _run(config, folder, loop, geometry, tokenizer, source)
            # A run that was complete already compiles nothing and keeps the figures that it has.
            if loop.compiled_bytes or not (folder / SUMMARY).exists():
                write_summary(folder, summary(trainer, geometry, loop, held_before))
    return 0


def _run(config: Config, folder: Path, loop: Loop, geometry: ModelConfig, tokenizer, source: Path | None) -> None:
    """Trains, and writes what the run gives."""
    trainer, dataset = loop.trainer, loop.dataset
    shown = _shown(config, dataset)
    before = _samples_before(folder, loop, shown, tokenizer and _answerer(trainer, geometry, tokenizer))
    try:
        loop.run()
    finally:
        loop.checkpoints.wait()  # no error may cut off the checkpoint that is being written
    _save_result(config, folder, trainer, source, tokenizer and tokenizer.chat_template)
    samples: list[Sample] = []
    if tokenizer and shown:
        samples = loop.stop.beside(lambda: _samples(shown, _answerer(trainer, geometry, tokenizer), before))
    _report(config, folder, loop, trainer, geometry, samples)


def _before_and_after(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each figure of the evaluations: the untrained model's and the trained one's."""
    evaluations = [row for row in rows if "eval_loss" in row]
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    both = [name for name in last if name != "step" and None not in (first.get(name), last[name])]
    return [f"{name}: {first[name]:.4f} before, {last[name]:.4f} after" for name in both]


def _dataset(config: Config, tokenizer, geometry: ModelConfig, today: datetime) -> Dataset:
    if tokenizer is None:
        _say("model.weights=random without a tokenizer: training on random tokens, for speed and memory only")
        return random_tokens(config, geometry.vocab_size)
    limit_vocabulary(tokenizer, geometry.vocab_size)
    return prepare(config, tokenizer, today)


def _tokenizer(config: Config, source: Path):
    """The base's tokenizer, with the chat template of the run."""
    tokenizer = load_tokenizer(str(source))
    if config.data.chat_template:
        tokenizer.chat_template = load_chat_template(config.data.chat_template)
    return tokenizer


def _answerer(trainer: Trainer, geometry: ModelConfig, tokenizer) -> Answerer:
    """The model as it is now, for answers no longer than it was made for."""
    folder, positions = trainer.loaded.folder, trainer.config.model.max_position or geometry.max_position
    stop_ids = stop_ids_of(folder, tokenizer) if folder else [tokenizer.eos_token_id]
    return Answerer(trainer.parts, tokenizer, stop_ids=stop_ids, positions=positions)


def _exact_match(config: Config, dataset: Dataset, geometry: ModelConfig, tokenizer):
    if not config.data.exact_match or not dataset.eval_documents:
        return None
    return lambda trainer: _answerer(trainer, geometry, tokenizer).exact_match(dataset.eval_documents)


def _shown(config: Config, dataset: Dataset) -> list[Encoded]:
    """The documents whose answers the report shows: spread over the evaluation rows."""
    documents, count = dataset.eval_documents, config.data.samples
    count = min(count, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]


def _samples_before(folder: Path, loop: Loop, shown: Sequence[Encoded], answerer: Answerer | None) -> list[str]:
    """The untrained model's answers, kept in the run folder for a run that is continued."""
    record = folder / BEFORE
    if loop.checkpoints.steps:
        return json.loads(record.read_text()) if record.exists() else []
    loop.evaluate_before()
    answers = loop.stop.beside(lambda: answerer.samples(shown)) if answerer and shown else []
    record.write_text(json.dumps(answers))
    return answers


def _samples(shown: Sequence[Encoded], answerer: Answerer, before: list[str]) -> list[Sample]:
    return [
        Sample(prompt=answerer.asked(d), before=b, after=a, expected=answerer.expected(d))
        for d, b, a in zip(shown, before or [""] * len(shown), answerer.samples(shown), strict=True)
    ]


def _save_result(
    config: Config, folder: Path, trainer: Trainer, source: Path | None, chat_template: Templates | None
) -> None:
    model = trainer.parts.merge()
    if config.method == "full":
        write_model(model, folder / "model", source, chat_template=chat_template)
        return
    write_adapter(
        folder / "adapter",
        model,
        lora_config(config),
        trainer.targets,
        base=config.model.path,
        base_hash=trainer.loaded.content_hash,
        extra=recorded_quantization(config),
        chat_template=chat_template,
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
    facts |= {f"Changed at step {one['step']}": "; ".join(one["changed"]) for one in read_changes(folder)}
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
