"""What a job is given: where its rows go, how large things are, and how long it may take."""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.names import COPY, READ, check_name
from benchmarks.gpu.results import Results, make_row
from benchmarks.gpu.sizes import ROOT, Sizes

GB = 1e9


class Refused(Exception):
    """Something that is not timed, because it computes the wrong thing."""


@dataclass
class Context:
    """A job's surroundings. `deadline` is on time.monotonic's clock."""

    results: Results
    job: str
    sizes: Sizes
    deadline: float

    def row(self, name: str, value: float | None, unit: str, **more) -> None:
        """Records a measurement; see `make_row`."""
        self.results.add(make_row(self.job, name, value, unit, **more))

    def missing(self, name: str, unit: str, note: str, **more) -> None:
        """Records that something was not measured, and why."""
        self.row(name, None, unit, note=note, **more)

    @property
    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def late(self, name: str, unit: str, needed: float) -> bool:
        """Whether fewer than `needed` seconds are left; the row then says so."""
        if self.time_left < needed and not self.sizes.smoke:
            self.missing(name, unit, "not measured: the part's time was up")
            return True
        return False

    def verified(self, implementation: str, operation: str = "dequantize") -> bool:
        """Whether the exactness check of this run found the implementation right on this device."""
        row = self.results.row(check_name(operation, implementation))
        return row is not None and row["passed"] is True

    def refusal(self, implementation: str, operation: str = "dequantize") -> str | None:
        """Why the implementation is not timed; None where it may be."""
        if self.verified(implementation, operation):
            return None
        row = self.results.row(check_name(operation, implementation))
        if row is None:
            return f"refused: {operation} ({implementation}) was not checked"
        if row["passed"] is None:
            return row["note"]
        return f"refused: {operation} ({implementation}) is wrong on this device"

    def require(self, implementation: str = "auto", operation: str = "dequantize") -> None:
        """Raises Refused unless the implementation was found right."""
        reason = self.refusal(implementation, operation)
        if reason:
            raise Refused(reason)

    @property
    def bandwidth(self) -> float | None:
        """bytes/s: the better of copying and reading, as measured in this run."""
        found = [value for value in (self.results.value(COPY), self.results.value(READ)) if value]
        return max(found) * GB if found else None


def reason(error: BaseException) -> str:
    """An error in one short line, without the paths of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for path, name in ((str(ROOT), "."), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text[:300]
