"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from qlora_jax.device.facts import memory_in_use
from qlora_jax.training.observer import Observer


class Progress:
    """Shows step, loss, tokens per second, memory and the time left.

    The time left comes from the steps after the first, which includes the compilation. On a terminal
    every step moves the bar; elsewhere each `log_every`-th step is one line.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, log_every: int = 1, stream: TextIO | None = None
    ) -> None:
        self._total, self._log_every = total_steps, log_every
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._first: tuple[int, float] | None = None
        self._bar: Bar | None = None
        if self._console.is_terminal:
            # A bar without a width of its own gives way to the numbers on a narrow terminal.
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show that `step` (counted from 1) is done."""
        left = self._time_left(step, time.monotonic())
        words = f"loss {loss:.4f} · {tokens_per_second:,.0f} tokens/s · {memory_in_use()} · {left}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=words)
        elif step % self._log_every == 0 or step == self._total:
            self.note(f"step {step}/{self._total} · {words}")

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._console.print(text, markup=False)

    def _time_left(self, step: int, now: float) -> str:
        if self._first is None:
            self._first = (step, now)
        first_step, since = self._first
        if step == first_step:
            return "time left unknown"
        return f"{duration((now - since) / (step - first_step) * (self._total - step))} left"

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


class Terminal(Observer):
    """Shows everything on standard error, as the commands do."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def steps(self, total: int, *, start_step: int = 0, log_every: int = 1) -> Progress:
        return Progress(total, start_step=start_step, log_every=log_every)


def duration(seconds: float) -> str:
    """`3:07` or `2:05:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
