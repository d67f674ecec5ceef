"""What a command prints when something is wrong: one line, and an exit code."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps

from qlora_jax.training.signals import leave

Main = Callable[[Sequence[str] | None], int]


def reports_errors(main: Main) -> Main:
    """Turns the errors that bad input raises into `error: …` on standard error and exit code 1.

    A defect of ours (TypeError, KeyError, …) keeps its traceback; QLORA_JAX_TRACEBACK=1 keeps every one.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return leave(main(argv))
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get("QLORA_JAX_TRACEBACK"):
                raise
            print(f"error: {_words(error)}", file=sys.stderr)
            return leave(1)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 128 + signal.SIGINT

    return run


def exit_code(stopped: int | None) -> int:
    """0, or what a shell expects where a signal ended the command in an orderly way."""
    return 0 if stopped is None else 128 + stopped


def _words(error: Exception) -> str:
    """The message; the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
