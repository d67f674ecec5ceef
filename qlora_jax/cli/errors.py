"""What a command prints when something is wrong: one line, and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps

Main = Callable[[Sequence[str] | None], int]


def reports_errors(main: Main) -> Main:
    """Turns the errors that bad input raises into `error: …` on standard error and exit code 1.

    A defect of ours (TypeError, KeyError, …) keeps its traceback; QLORA_JAX_TRACEBACK=1 keeps every one.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get("QLORA_JAX_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run
