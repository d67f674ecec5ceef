"""Stopping in an orderly way when the system or the user asks for it."""

import contextlib
import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import psutil

T = TypeVar("T")

# `timeout` and closed terminals send one signal twice within milliseconds; nobody types Ctrl-C so fast.
ECHO = 0.2
POLL = 0.05

_abandoned = False


class Stopped(Exception):
    """A signal asked the run to stop, and whatever it had learned is saved. `signal` is the signal's number."""

    def __init__(self, signal: int, where: str = "before the next step"):
        super().__init__(f"stopped by signal {signal} {where}; the same command continues from there")
        self.signal = signal


class StopRequest:
    """While active, the first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is only noted. A second SIGINT ends the process.

    A SIGHUP that whoever started the process wants ignored (nohup) is ignored. So is every signal whose handler is not
    Python's and could not be given back; and in another thread than the main one, the only one that Python lets set
    handlers, nothing is noted.

    Args:
      around: entered by the thread that `beside` starts.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext) -> None:
        self.signal: int | None = None
        self._around = around
        self._since = 0.0

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def beside(self, work: Callable[[], T]) -> T:
        """What `work` gives. When a signal comes, `work` is left to itself and Stopped is raised.

        So it must only compute: encode, load, compile, evaluate, generate. It runs in a thread of its own, because
        Python hears no signal while a library computes.
        """
        global _abandoned
        self.check()
        box: dict[str, Any] = {}
        context = contextvars.copy_context()

        def run() -> None:
            try:
                with self._around():
                    box["result"] = context.run(work)
            except BaseException as error:
                box["error"] = error

        thread = threading.Thread(target=run, name="beside", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            if self.signal is not None and thread.is_alive():
                _abandoned = True
                raise Stopped(self.signal)
        if "error" in box:
            raise box["error"]
        return box["result"]

    def __enter__(self) -> Self:
        heard = self.SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {n: signal.signal(n, self._note) for n in heard if not _is_kept(n)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if number != signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        elif number == signal.SIGINT and time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_kept(number: int) -> bool:
    """Whether the signal's handler stays: nohup's, or one that was not set by Python."""
    handler = signal.getsignal(number)
    return handler is None or (number == signal.SIGHUP and handler is signal.SIG_IGN)


def leave(code: int) -> int:
    """The exit code, for a process that ends by itself; one with work left to itself ends here, without waiting for it.

    A library that computes cannot be told to stop, and must not meet an interpreter that is being taken down.
    """
    if _abandoned:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
