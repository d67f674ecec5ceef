"""One training run from its configuration to its report."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

import jax

from qlora_jax import kernels
from qlora_jax.config import Config
from qlora_jax.data import Encoded, limit_vocabulary, load_chat_template, load_tokenizer
from qlora_jax.device.facts import memory_in_use, peak_memory
from qlora_jax.io.chat_template import Templates
from qlora_jax.io.hf import read_config
from qlora_jax.io.peft import TrainedOn, write_adapter
from qlora_jax.io.save import write_model
from qlora_jax.models.config import DTYPES, ModelConfig
from qlora_jax.report.run import Sample
from qlora_jax.run.load import stop_ids_of
from qlora_jax.run.observing import Progress, observer_of
from qlora_jax.run.out_of_memory import explains_out_of_memory, warn_if_too_large
from qlora_jax.run.samples import Answerer
from qlora_jax.run.train_report import report, summary, trainable
from qlora_jax.run.train_result import TrainResult
from qlora_jax.training.assumptions import assumptions
from qlora_jax.training.dataset import Dataset, prepare, random_tokens
from qlora_jax.training.lock import RunLock
from qlora_jax.training.loop import Hooks, Loop
from qlora_jax.training.observer import Observer
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
    record_run,
    start_step,
    write_summary,
)
from qlora_jax.training.setup import (
    Trainer,
    base_folder,
    check_length,
    for_geometry,
    make_trainer,
    storage_record,
)
from qlora_jax.training.signals import Stopped, StopRequest

BEFORE = "samples_before.json"
DETERMINISTIC = "--xla_gpu_deterministic_ops"


def train(config: Config, *, progress: Progress = False) -> TrainResult:
    """Runs (or continues) the run of `config.output_dir`.

    Everything that can be wrong with the input is checked before the run folder is written.

    In the main thread SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 end the run within a step, its state saved: this
    returns, with the signal in the result's `stopped`, and the same call goes on from there. What computes meanwhile is
    left to itself. In other threads signals are the main thread's matter.

    Args:
      progress: True shows what is going on on standard error, as the command does; an Observer hears of it. Else notes
        go to the log.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or unsupported.
      Diverged: a loss is no finite number any more.
      OutOfMemory: the device has too little; the message says what to change.
    """
    observer = observer_of(progress)

    def choice():
        return kernels.using(config.model.kernels)

    with choice(), StopRequest(around=choice) as stop:
        kernels.available(DTYPES[config.model.dtype])
        folder = check_run_folder(config)
        try:
            with RunLock(folder) as lock:
                _train(config, folder, lock, Hooks(stop=stop, observer=observer))
        except Stopped as stopped:
            observer.note(str(stopped))
            return TrainResult(folder=folder, stopped=stopped.signal)
    return TrainResult(folder=folder)


def _train(config: Config, folder: Path, lock: RunLock, hooks: Hooks) -> None:
    stop, observer = hooks.stop, hooks.observer
    source = stop.beside(lambda: base_folder(config))  # which may have to come from the Hub
    model_config = read_config(source or Path(config.model.geometry))
    config = for_geometry(config, model_config)
    check_same_run(config)
    is_begun = (folder / RECORD).exists()
    if is_begun:
        enter_run_folder(lock, config, begun=True)
    start = start_step(config)
    check_length(config, model_config.max_position)
    tokenizer = None if source is None else _tokenizer(config, source)
    chat_template = tokenizer and tokenizer.chat_template
    today = begun(folder)
    dataset = stop.beside(lambda: _dataset(config, tokenizer, model_config, today, observer))
    steps = config.train.steps or math.ceil((config.train.epochs or 1) * len(dataset.batches))
    if finished_beyond(config, steps):
        observer.note(f"{folder} holds a finished run of more than {steps} steps: it is left as it is")
        return
    assumed = assumptions(dataset, tokenizer, steps)
    changed = check_assumptions(config, start, assumed) if start else []
    _warn_if_not_deterministic(config, observer)
    warn_if_too_large(config, model_config, observer)
    held_before = peak_memory() or 0
    with explains_out_of_memory(config, model_config):
        trainer = stop.beside(lambda: make_trainer(config, source, steps))
        if start:
            check_same_base(config, start, trainer.loaded.content_hash)
        if changed:
            observer.note(f"going on from step {start} with changes: {'; '.join(changed)}")
        observer.note(f"{config.method}: {trainable(trainer, model_config)}; {steps} steps; {memory_in_use()}")
        with explains_full_disk(folder):
            enter_run_folder(lock, config, begun=is_begun)
            record_run(config, chat_template, today, {"step": start, "changed": changed} if changed else None)
            exact_match = _exact_match(config, dataset, model_config, tokenizer)
            loop = Loop(trainer, dataset, folder, assumed, dataclasses.replace(hooks, extra_metrics=exact_match))
            with closing(loop.checkpoints):
                _run(config, folder, loop, model_config, tokenizer, source)
            # A run that was complete already compiles nothing and keeps the figures that it has.
            if loop.compiled_bytes or not (folder / SUMMARY).exists():
                write_summary(folder, summary(trainer, model_config, loop, held_before))


def _run(config: Config, folder: Path, loop: Loop, model_config: ModelConfig, tokenizer, source: Path | None) -> None:
    """Trains, and writes what the run gives."""
    trainer, dataset = loop.trainer, loop.dataset
    shown = _shown(config, dataset)
    before = _samples_before(folder, loop, shown, tokenizer and _answerer(trainer, model_config, tokenizer))
    try:
        loop.run()
    finally:
        loop.checkpoints.wait()  # no error may cut off the checkpoint that is being written
    _save_result(config, folder, trainer, source, tokenizer and tokenizer.chat_template)
    samples: list[Sample] = []
    if tokenizer and shown:
        samples = loop.stop.beside(lambda: _samples(shown, _answerer(trainer, model_config, tokenizer), before))
    report(config, folder, loop, trainer, model_config, samples)


def _warn_if_not_deterministic(config: Config, observer: Observer) -> None:
    """The command sets XLA's flag before JAX starts; a Python program has to do so itself."""
    needed = config.train.deterministic and jax.default_backend() == "gpu"
    if needed and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        observer.warn(f"train.deterministic=True has no effect: set XLA_FLAGS={DETERMINISTIC}=true before JAX starts")


def _dataset(config: Config, tokenizer, model_config: ModelConfig, today: datetime, observer: Observer) -> Dataset:
    if tokenizer is None:
        observer.note("model.weights=random without a tokenizer: training on random tokens, for speed and memory only")
        return random_tokens(config, model_config.vocab_size)
    limit_vocabulary(tokenizer, model_config.vocab_size)
    return prepare(config, tokenizer, today)


def _tokenizer(config: Config, source: Path):
    """The base's tokenizer, with the chat template of the run."""
    tokenizer = load_tokenizer(str(source))
    if config.data.chat_template:
        tokenizer.chat_template = load_chat_template(config.data.chat_template)
    return tokenizer


def _answerer(trainer: Trainer, model_config: ModelConfig, tokenizer) -> Answerer:
    """The model as it is now, for answers no longer than it was made for."""
    folder, positions = trainer.loaded.folder, trainer.config.model.max_position or model_config.max_position
    stop_ids = stop_ids_of(folder, tokenizer) if folder else [tokenizer.eos_token_id]
    return Answerer(trainer.parts, tokenizer, stop_ids=stop_ids, positions=positions)


def _exact_match(config: Config, dataset: Dataset, model_config: ModelConfig, tokenizer):
    if not config.data.exact_match or not dataset.eval_documents:
        return None
    return lambda trainer: _answerer(trainer, model_config, tokenizer).exact_match(dataset.eval_documents)


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
        config.lora,
        trainer.targets,
        TrainedOn(config.model.path, trainer.loaded.content_hash, storage_record(config)),
        chat_template=chat_template,
    )
