"""Requests that wait for a row: first come, first served for one adapter, and adapters in turn."""

import collections
from collections.abc import Callable

from qlora_jax.serve.job import Job


class FairQueue:
    """At most `limit` jobs. Not thread-safe."""

    def __init__(self, limit: int):
        self.limit = limit
        self._waiting: dict[str | None, collections.deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, job: Job) -> None:
        """At the end of its adapter's line."""
        self._waiting.setdefault(job.request.adapter, collections.deque()).append(job)

    def fronts(self) -> list[Job]:
        """The first job of each adapter; the adapter that has waited longest for its turn first."""
        return [line[0] for line in self._waiting.values()]

    def take(self, job: Job) -> None:
        """Takes out a job that has got a row; its adapter's next turn comes after all others'."""
        line = self._waiting.pop(job.request.adapter)
        assert line.popleft() is job
        if line:
            self._waiting[job.request.adapter] = line

    def remove(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Takes out the jobs that are `unwanted`; nobody's turn changes."""
        found = [job for line in self._waiting.values() for job in line if unwanted(job)]
        for name, line in list(self._waiting.items()):
            rest = collections.deque(job for job in line if not any(job is other for other in found))
            if rest:
                self._waiting[name] = rest
            else:
                del self._waiting[name]
        return found
