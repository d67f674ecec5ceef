"""What happens between two steps, and what is in them: requests get rows and adapters, prompts are read, texts grow."""

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence

from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.device import DeviceSlots
from qlora_jax.serve.adapters.reading import HostAdapter
from qlora_jax.serve.job import BASE, Job, Row, best_row, cancelled, prompt_scored
from qlora_jax.serve.programs import Drawn, Scores
from qlora_jax.serve.queue import FairQueue
from qlora_jax.serve.request import Finished, Refused
from qlora_jax.serve.runner import Piece, Runner, fetch
from qlora_jax.serve.translate import inputs_of, token_of, wants_scores

COUNTERS = (
    *("requests", "prompt_tokens", "cached_tokens", "tokens", "steps", "installs"),
    *("stop", "length", "cancelled", "failed"),
)
UNSOUND = "the model's scores are not finite here: the adapter's weights are too large for the number format"


@dataclasses.dataclass(frozen=True)
class Written:
    """A step that draws tokens, perhaps still under way, and the jobs whose they are."""

    drawn: Drawn
    jobs: list[tuple[Row, Job]]


@dataclasses.dataclass(frozen=True)
class Read:
    """A piece of a prompt that is being read, where it gives something that is wanted."""

    row: Row
    job: Job
    piece: Piece
    drawn: Drawn
    scores: Scores | None


class Scheduler:
    """Rows, adapters and waiting requests. All but the queue belongs to the engine's thread.

    Attributes:
      seconds: that a request keeps its row, as a running mean.

    Args:
      lock: held by whoever touches `queue` or `counters`.
      stop_ids: tokens that end a text.
    """

    def __init__(
        self, runner: Runner, store: AdapterStore, queue: FairQueue, lock: threading.Condition, stop_ids: Sequence[int]
    ):
        self.runner, self.store, self.queue, self.lock = runner, store, queue, lock
        self.stop_ids = frozenset(stop_ids)
        self.rows = [Row(index) for index in range(runner.rows)]
        self.device = DeviceSlots(runner.slots)
        self.counters = collections.Counter(dict.fromkeys(COUNTERS, 0))
        self.seconds = 1.0
        self._reading: collections.deque[Row] = collections.deque()
        self._under_way: Written | None = None

    def step(self) -> bool:
        """One piece of one prompt and one token for every text; False where there was nothing to do.

        The device gets its next work before the tokens of the last step are looked at, and need not wait for us. A text
        that turns out to have ended is thereby read one token too far. Nobody hears of the token after it, and it stays
        in the row as what it is, the text's last.
        """
        self._drop_cancelled()
        while self._admit():
            pass
        busy = any(row.job for row in self.rows)
        read, written = self._read(), self._write()
        if self._under_way:
            self._hand_on(self._under_way)
        self._under_way = written
        if read:
            self._have_read(read)
        return busy

    @property
    def answered(self) -> int:
        """How many requests have come to their own end."""
        return self.counters["stop"] + self.counters["length"]

    def fail(self, error: str, *, waiting: bool) -> None:
        """Ends all running requests, and the waiting ones too where asked for, and forgets what is on the device."""
        for row in self.rows:
            if row.job:
                self._finish(row, "failed", error)
            row.key, row.tokens = "", []
        self._under_way = None
        for number in range(1, len(self.device.slots) + 1):
            self.device.empty(number)
        with self.lock:
            jobs = self.queue.remove(lambda job: waiting)
        for job in jobs:
            self._drop(job, Finished("failed", error=error))

    def _drop_cancelled(self) -> None:
        with self.lock:
            jobs = self.queue.remove(lambda job: job.cancelled)
        for job in jobs:
            self._drop(job, cancelled(job))
        for row in self.rows:
            if row.job and row.job.cancelled:
                self._finish(row, "cancelled")

    def _drop(self, job: Job, event: Finished) -> None:
        """Ends a request that never got a row."""
        if job.want:
            self.store.release(job.want)
        self._count(event.reason)
        job.tell(event)

    def _admit(self) -> bool:
        """Gives rows to the first request of each adapter, in turn; whether any has left the queue."""
        with self.lock:
            fronts = self.queue.fronts()
        self.device.forget_claims()
        return any([self._place(job) for job in fronts])

    def _place(self, job: Job) -> bool:
        """Starts a request, or ends it where its adapter cannot be served; False where it has to wait."""
        free = [row for row in self.rows if not row.job]
        try:
            slot = self._slot(job) if free else None
            if not free:
                self._prepare(job)
        except Refused as error:
            self._take(job)
            self._drop(job, Finished("failed", error=str(error), refused=True))
            return True
        except Exception as error:
            # Whatever went wrong, it is this request that must not be tried again.
            self._take(job)
            self._drop(job, Finished("failed", error=f"its adapter could not be put on the device: {error}"))
            raise
        if slot is None:
            return False
        self._take(job)
        self._start(job, slot, free)
        return True

    def _take(self, job: Job) -> None:
        with self.lock:
            self.queue.take(job)

    def _slot(self, job: Job) -> int | None:
        """The adapter's place on the device, used once more; None while it has none, and has to wait for one."""
        if job.want is None:
            return 0
        key = self.store.key(job.want)
        number = None if key is None else self.device.find(key)
        if number is None:
            adapter = self.store.get(job.want)
            number = None if adapter is None else self.device.room()
            if adapter is None or number is None:
                return None
            self._install(number, adapter, job.request.adapter or "")
        return number if self.device.take(number) else None

    def _prepare(self, job: Job) -> None:
        """Has the adapter read while there is no row."""
        if job.want is None:
            return
        key = self.store.key(job.want)
        if key is None or self.device.find(key) is None:
            self.store.get(job.want)

    def _install(self, number: int, adapter: HostAdapter, name: str) -> None:
        self.runner.install(number, adapter.weights)
        self.device.put(number, adapter.key, name, adapter.rank)
        self._count("installs")

    def _start(self, job: Job, slot: int, free: list[Row]) -> None:
        key = BASE
        if job.want:
            key = self.device.slots[slot - 1].key or ""
            self.store.release(job.want)
        prompt = job.request.prompt
        row, shared = best_row(free, key, prompt, cuts=self.runner.cuts)
        if job.request.score_prompt:
            shared = 0  # scores come from hidden states, which are not kept
        job.began = time.monotonic()
        row.job, row.key, row.tokens = job, key, row.tokens[:shared]
        job.slot, job.cached, job.pieces = slot, shared, self.runner.pieces(shared, len(prompt))
        self._reading.append(row)
        self._count("cached_tokens", shared)

    def _read(self) -> Read | None:
        """Starts to read a piece of a prompt, each prompt in turn; None where nothing is to be had from it."""
        if not self._reading:
            return None
        row = self._reading[0]
        self._reading.rotate(-1)
        job = row.job
        assert job
        piece, scored = job.pieces.pop(0), job.request.score_prompt
        drawn, scores = self.runner.prefill(
            row.index, job.prompt, piece, inputs_of({0: row}, 1, self.runner.length), scored=scored
        )
        row.tokens.extend(job.request.prompt[piece.start : piece.end])
        self._count("prompt_tokens", piece.end - piece.start)
        return Read(row, job, piece, drawn, scores if scored else None) if scored or not job.pieces else None

    def _have_read(self, read: Read) -> None:
        """Takes the scores of a piece, and after the last one the first new token."""
        row, job, piece = read.row, read.job, read.piece
        drawn, scores = fetch((read.drawn, read.scores))
        if job.request.score_prompt:
            following = job.request.prompt[piece.start + 1 : piece.end + 1]
            job.scores += [token_of(job, token, scores, place) for place, token in enumerate(following)]
        if job.pieces:
            return
        self._reading.remove(row)
        if job.request.score_prompt:
            job.tell(prompt_scored(job))
        if job.request.max_new_tokens == 0:
            self._finish(row, "length")
        else:
            self._drawn(row, drawn, 0)

    def _write(self) -> Written | None:
        """Starts to draw a token for every text; None where there is none."""
        jobs = [(row, row.job) for row in self.rows if row.job and row.job.writes]
        if not jobs:
            return None
        drawn = self.runner.decode(inputs_of({row.index: row for row, _ in jobs}, len(self.rows), self.runner.length))
        self._count("steps")
        for _, job in jobs:
            job.ahead += 1
        return Written(drawn, jobs)

    def _hand_on(self, written: Written) -> None:
        """Hands on the tokens of a step to those jobs that have not ended since."""
        jobs = [(row, job) for row, job in written.jobs if row.job is job]
        if not jobs:
            return
        drawn = fetch(written.drawn)
        for row, job in jobs:
            job.ahead -= 1
            row.tokens.append(job.last)
            self._drawn(row, drawn, row.index)

    def _drawn(self, row: Row, drawn: Drawn, place: int) -> None:
        """Hands a row's new token on, and ends its request where that was the last."""
        job, token = row.job, int(drawn.tokens[place])
        assert job
        if not drawn.sound[place]:
            self._finish(row, "failed", UNSOUND, refused=True)
            # What is not finite in the cache would reach the row's next text.
            self.runner.clear(row.index)
            row.key, row.tokens = "", []
        elif token in self.stop_ids:
            ended = token_of(job, token, drawn.scores, place) if wants_scores(job) else None
            job.last = token
            self._finish(row, "stop", token=ended)
        else:
            job.last, job.drawn = token, job.drawn + 1
            self._count("tokens")
            job.tell(token_of(job, token, drawn.scores, place))
            if job.drawn == job.request.max_new_tokens:
                self._finish(row, "length")

    def _finish(self, row: Row, reason, error: str = "", **more) -> None:
        job = row.job
        assert job
        if row in self._reading:
            self._reading.remove(row)
        if job.ahead:
            row.tokens.append(job.last)  # the step under way reads it into the row, wanted or not
        self.device.release(job.slot)
        row.job, row.used = None, max(row.used for row in self.rows) + 1
        self.seconds += (time.monotonic() - job.began - self.seconds) / 8
        self._count(reason)
        job.tell(Finished(reason, job.cached, error, **more))

    def _count(self, name: str, by: int = 1) -> None:
        with self.lock:
            self.counters[name] += by
