"""One comparison from its configuration to its report."""

import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from qlora_jax.compare.memory import GPU, memory_in_a_process
from qlora_jax.compare.results import comparison
from qlora_jax.compare.study import SEEDS, Outcome, Run, Study, check_files, check_study, start_study
from qlora_jax.config import Config
from qlora_jax.report.comparison import write_comparison
from qlora_jax.report.run import versions
from qlora_jax.run.choices import check_choice
from qlora_jax.run.observing import Progress, observer_of
from qlora_jax.run.train import train
from qlora_jax.training.loop import Diverged
from qlora_jax.training.observer import Observer
from qlora_jax.training.run_folder import SUMMARY, check_run_folder, check_same_run

RESULT = "compare.json"


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What a comparison has left in its folder.

    Attributes:
      folder: the comparison's.
      result: what compare.json holds; None where a signal came before the end.
      page: report.html; None likewise.
      stopped: the signal, or None. The same call goes on from there.
    """

    folder: Path
    result: dict[str, Any] | None = None
    page: Path | None = None
    stopped: int | None = None

    @property
    def file(self) -> Path:
        """compare.json's place."""
        return self.folder / RESULT


class Stopped(Exception):
    """A run was asked to stop; `code` is the exit code of its command."""

    def __init__(self, signal: int):
        super().__init__("stopped; the same command goes on from there")
        self.signal, self.code = signal, 128 + signal


def compare(
    config: Config,
    out: str | Path,
    *,
    mode: Literal["quick", "default", "ablations"] = "default",
    progress: Progress = False,
) -> CompareResult:
    """Runs (or continues) the comparison in the folder `out`: full fine-tuning, LoRA and QLoRA of one base.

    Everything that can be wrong with the input is checked before the folder is written. Signals are as in `train`.

    Args:
      mode: "quick" has one seed and fewer steps, "ablations" also other formats, ranks and targets.
      progress: as in `train`.

    Raises:
      ValueError, FileNotFoundError, NotImplementedError: with what is missing, wrong or in the way.
      Diverged: a whole run diverged, or all the short ones of a method did.
    """
    check_choice("mode", mode, SEEDS)
    out, observer = Path(out), observer_of(progress)
    study = Study(config, out, mode)
    check_study(study)
    runs = Study(check_files(config), out, mode)
    start_study(study)
    try:
        found = list(outcomes(runs, observer))
    except Stopped as stop:
        observer.note(str(stop))
        return CompareResult(folder=out, stopped=stop.signal)
    result = comparison(study, found, memory(study, observer), about())
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return CompareResult(folder=out, result=result, page=write_comparison(out, result))


def outcomes(study: Study, observer: Observer) -> Iterator[Outcome]:
    """Trains what is not finished yet, a method at a time.

    Raises:
      Stopped: a run was asked to stop.
      Diverged: a whole run diverged, or all the short ones of a method did.
    """
    for method in study.methods:
        search = searched(study.searches(method), observer)
        best = min(search, key=search.__getitem__)
        if search[best] == math.inf:
            raise Diverged(f"{method.title} diverged at {best:g} and higher: lower optim.learning_rate")
        observer.note(f"{method.name}: learning rate {best:g}, validation loss {search[best]:.4f}")
        finals = study.finals(method, best)
        for run in finals:
            finish(run, observer)
        yield Outcome(method=method, search=search, runs=finals)


def searched(runs: Sequence[Run], observer: Observer) -> dict[float, float]:
    """The validation losses of short runs by their learning rates, of those that `downhill` asks for."""
    losses = downhill(len(runs), lambda index: validation_loss(runs[index], observer))
    return {runs[index].rate: losses[index] for index in sorted(losses)}


def downhill(count: int, loss: Callable[[int], float]) -> dict[int, float]:
    """The losses at some of `count` (two or more) indices: those in the middle, then on where it goes down."""
    low = (count - 1) // 2
    found = {low: loss(low), low + 1: loss(low + 1)}
    # Where both diverged, the way is to lower rates.
    step = 1 if found[low + 1] < found[low] else -1
    here = low + 1 if step == 1 else low
    while 0 <= here + step < count:
        found[here + step] = loss(here + step)
        if found[here + step] > found[here]:
            break
        here += step
    return found


def validation_loss(run: Run, observer: Observer) -> float:
    """The validation loss after a short run; infinite where it diverges."""
    try:
        finish(run, observer)
    except Diverged:
        observer.note(f"{run.folder.name}: diverged")
        return math.inf
    loss = run.evaluation()["eval_loss"]
    return math.inf if loss is None else loss  # the log has null for what is no finite number


def finish(run: Run, observer: Observer) -> None:
    """Runs to the end, unless that was done before. Raises ValueError where the folder holds another run."""
    check_run_folder(run.config)
    check_same_run(run.config)
    if (run.folder / SUMMARY).exists():
        return
    observer.note(f"{run.folder.parent.name}/{run.folder.name}: learning rate {run.rate:g}, seed {run.seed}")
    stopped = train(run.config, progress=observer).stopped
    if stopped is not None:
        raise Stopped(stopped)


def memory(study: Study, observer: Observer) -> dict[str, Any]:
    """The 7B rows; compiled but where time is short. Kept in the folder, because compiling takes a minute."""
    file = study.out / "memory.json"
    if not file.exists():
        observer.note("planning the memory of a 7B model …")
        found = memory_in_a_process(None if study.mode == "quick" else GPU)
        if found["not_compiled"] and study.mode != "quick":
            observer.note(f"by arithmetic, not compiled: {found['not_compiled']}")
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


def about() -> dict[str, Any]:
    """Machine and versions."""
    device = jax.local_devices()[0]
    machine = {"device": device.device_kind, "platform": device.platform}
    return {"machine": machine | {"cpu": processor(), "arch": platform.machine()}, "versions": dict(versions())}


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
