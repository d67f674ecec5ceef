"""The training loop: steps, rows of metrics, evaluations, checkpoints, and an orderly stop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from qlora_jax.config import to_dict
from qlora_jax.data import eval_batches
from qlora_jax.device.facts import ProgramMemory
from qlora_jax.io.identity import sample_record
from qlora_jax.training.batch import to_device
from qlora_jax.training.dataset import Dataset
from qlora_jax.training.metrics import MetricsLog
from qlora_jax.training.observer import Observer, Steps
from qlora_jax.training.offload import paged_like, whole_state
from qlora_jax.training.run_folder import open_checkpoints, start_step
from qlora_jax.training.setup import Trainer
from qlora_jax.training.signals import Stopped, StopRequest
from qlora_jax.training.step import evaluate

# Adds columns such as exact_match to an evaluation row.
ExtraMetrics = Callable[[Trainer], dict[str, float]]


class Diverged(RuntimeError):
    """A loss, an evaluation or a gradient that is no finite number."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a loop asks of those around it, and whom it tells what it does."""

    stop: StopRequest
    observer: Observer
    extra_metrics: ExtraMetrics | None = None


class Loop:
    """Drives a Trainer over a Dataset, from whatever step its checkpoints hold to `assumed["steps"]`.

    `assumed` is what `assumptions` gives, and is recorded with every checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        folder: Path,
        assumed: Mapping[str, Any],
        hooks: Hooks,
    ):
        self.trainer, self.dataset, self.folder, self.assumed = trainer, dataset, folder, assumed
        self.steps: int = assumed["steps"]
        self.extra_metrics, self.stop, self.observer = hooks.extra_metrics, hooks.stop, hooks.observer
        self.section = trainer.config.train
        self.checkpoints = open_checkpoints(folder, trainer.config)
        self.compiled_bytes: int | None = None

    def run(self) -> None:
        """Runs to the end.

        Raises:
          Stopped: a signal came; a checkpoint of the last finished step is on disk.
          Diverged: a loss, in training or evaluation, is no finite number any more.
        """
        start = self._restore()
        with (
            MetricsLog(self.folder, restored_step=start) as log,
            self.observer.steps(self.steps, start_step=start, log_every=self.section.log_every) as progress,
        ):
            if start:
                progress.note(f"continuing from the checkpoint of step {start}")
            self._evaluate_late(start, log, progress)
            if start < self.steps:
                step_fn = self._compile(progress)
                self.checkpoints.drop_after(start)
                for step in range(start, self.steps):
                    self._one_step_or_stop(step, step_fn, log, progress)
            self.checkpoints.wait()

    def _one_step_or_stop(self, step: int, step_fn, log: MetricsLog, progress: Steps) -> None:
        """A signal is heard after the step, or during its evaluation, which is then made up for by the next start."""
        try:
            self._one_step(step, step_fn, log, progress)
            self.stop.check()
        except Stopped as stopped:
            self._save(step + 1, None)
            self.checkpoints.wait()
            raise Stopped(stopped.signal, f"after step {step + 1}") from None

    def _one_step(self, step: int, step_fn, log: MetricsLog, progress: Steps) -> None:
        trainer, began = self.trainer, time.monotonic()
        batch, base = self.dataset.batches.at(step), trainer.parts.base
        arrays = to_device(batch, trainer.objective.arrays, base)
        trained, trainer.opt_state, metrics = step_fn(
            trainer.parts.trained, trainer.opt_state, base, arrays, self._key(step)
        )
        trainer.parts = trainer.parts._replace(trained=trained)
        row = {name: value.item() for name, value in jax.device_get(metrics).items()}
        done = step + 1
        rate = int((batch["segment_ids"] > 0).sum()) / (time.monotonic() - began)
        self._check_finite(done, row)
        if done % self.section.log_every == 0 or done == self.steps:
            log.write({"step": done, **row, "learning_rate": float(trainer.schedule(step)), "tokens_per_second": rate})
        progress.update(done, loss=row["loss"], tokens_per_second=rate)
        last = done == self.steps
        evaluated = self._evaluate(done, log, progress) if self._evaluation_due(done) else None
        if last or evaluated or self._due(done, self.section.save_every):
            self._save(done, evaluated)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _evaluation_due(self, step: int) -> bool:
        return self._due(step, self.section.eval_every) or step == self.steps

    def _evaluate_late(self, start: int, log: MetricsLog, progress: Steps) -> None:
        """The evaluation of the checkpoint that the run goes on from, where a signal ended it."""
        missing = not any(row["step"] == start and "eval_loss" in row for row in log.kept)
        if start and missing and self._evaluation_due(start) and (row := self._evaluate(start, log, progress)):
            self.checkpoints.add_metrics(start, row)

    def _evaluate(self, step: int, log: MetricsLog, progress: Steps) -> dict[str, float] | None:
        if not self.dataset.eval_documents:
            return None
        trainer = self.trainer
        found = self.stop.beside(lambda: evaluate(trainer.eval_step, trainer.parts, self._eval_batches()))
        # How many tokens are scored is a matter of the rows, and the same in every evaluation.
        row = {f"eval_{name}": value for name, value in found.items() if name != "tokens"}
        self._check_finite(step, row)
        extra = self.extra_metrics
        row |= self.stop.beside(lambda: extra(trainer)) if extra else {}
        log.write({"step": step, **row})
        progress.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
        return row

    def evaluate_before(self) -> dict[str, float]:
        """The evaluation row of the untrained adapters, written as step 0 when the run is new."""
        if self.checkpoints.steps:
            return {}
        with MetricsLog(self.folder) as log, self.observer.steps(self.steps) as progress:
            return self._evaluate(0, log, progress) or {}

    def _eval_batches(self) -> Iterator[Any]:
        documents = self.dataset.eval_documents
        # Every row is one document: no more padding than the longest needs. Rounding keeps the compiled shapes few.
        longest = -(-max(len(document.ids) for document in documents) // 64) * 64
        return eval_batches(
            documents,
            seq_len=min(longest, self.section.seq_len),
            batch_size=self.section.batch_size,
            pad_id=self.dataset.batches.pad_id,
        )

    def _key(self, step: int) -> jax.Array | None:
        """The step's dropout key: a function of seed and step, so that a resumed run draws the same."""
        if self.trainer.config.lora.dropout == 0 or self.trainer.config.method == "full":
            return None
        return jax.random.fold_in(jax.random.key(self.trainer.config.seed), step)

    def _compile(self, progress: Steps):
        """The train step compiled for the run's only batch shape; says so, because the first time takes a while."""
        trainer = self.trainer
        progress.note("compiling the train step (a second start finds it in the cache) …")
        began = time.monotonic()
        batch = to_device(self.dataset.batches.at(0), trainer.objective.arrays, trainer.parts.base)
        arguments = (trainer.parts.trained, trainer.opt_state, trainer.parts.base, batch)
        compiled = self.stop.beside(lambda: trainer.train_step.lower(*arguments, self._key(0)).compile())
        self.compiled_bytes = ProgramMemory.of(compiled).peak
        progress.note(f"compiled in {time.monotonic() - began:.1f} s")
        return compiled

    def _restore(self) -> int:
        """Puts the chosen checkpoint's state into the trainer and returns its step; 0 for a fresh start."""
        step = start_step(self.trainer.config)
        if step:
            trainer = self.trainer
            whole = whole_state(trainer.opt_state)
            state = self.checkpoints.restore(step, adapters=trainer.parts.trained, optimizer=whole)
            trainer.opt_state = paged_like(trainer.opt_state, state["optimizer"])
            trainer.parts = trainer.parts._replace(trained=state["adapters"])
        return step

    def _save(self, step: int, metrics: dict[str, float] | None) -> None:
        trainer = self.trainer
        epoch, index = divmod(step, len(self.dataset.batches))
        meta = {
            "step": step,
            "base_hash": trainer.loaded.content_hash,
            **sample_record(trainer.loaded.content_hash),
            "rng": {"seed": trainer.config.seed, "fold_in": step},
            "data": {"seed": trainer.config.seed, "epoch": epoch, "batch": index},
            "assumes": self.assumed,
            "config": to_dict(trainer.config),
        }
        # Pages or not, a checkpoint looks the same: a run may go on with another optim.offload.
        self.checkpoints.save(step, trainer.parts.trained, whole_state(trainer.opt_state), meta, metrics)

    def _check_finite(self, step: int, row: Mapping[str, float]) -> None:
        """Raises Diverged where a figure is no finite number: before it is logged, or saved as a checkpoint's."""
        if all(math.isfinite(value) for value in row.values()):
            return
        saved, config = self.checkpoints.steps, self.trainer.config
        figures = ", ".join(f"{name} {value}" for name, value in row.items())
        raise Diverged(
            f"step {step}: {figures}: {'training has diverged' if step else 'the untrained model has diverged'}. "
            f"The last checkpoint is of step {saved[-1] if saved else 'none'}; check the data, and begin again in a "
            f"new output_dir with a lower optim.learning_rate (now {config.optim.learning_rate}) "
            f"or model.dtype=bf16 or fp32 (now {config.model.dtype})"
        )
