"""Who hears what a long call does: the log, unless somebody wants to see it."""

import logging
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger("qlora_jax")


class Steps(Protocol):
    """Follows the steps of a run while it is entered."""

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """`step`, counted from 1, is done."""

    def note(self, text: str) -> None:
        """Something that is said between the steps."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Observer:
    """Passes notes to the log, and shows no steps. Whoever wants more overrides these methods.

    They are called on the thread of the call that is observed.
    """

    def note(self, text: str) -> None:
        """What a person may want to know, a line or more."""
        logger.info(text)

    def warn(self, text: str) -> None:
        """What a person should know before going on."""
        logger.warning(text)

    def steps(self, total: int, *, start_step: int = 0, log_every: int = 1) -> Steps:
        """What follows the steps from `start_step` to `total`; each `log_every`-th is of interest in a log."""
        return LoggedSteps(self)


class LoggedSteps:
    """Shows no steps; notes are the observer's."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        pass

    def note(self, text: str) -> None:
        self._observer.note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
