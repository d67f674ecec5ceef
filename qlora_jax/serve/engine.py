"""The engine: one thread that reads prompts and draws tokens for many requests at once, each with its own adapter."""

import logging
import threading

from qlora_jax.models.config import ModelConfig
from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.store import Want
from qlora_jax.serve.job import Job
from qlora_jax.serve.programs import TOP_LOGPROBS
from qlora_jax.serve.queue import FairQueue
from qlora_jax.serve.request import Draining, Listener, QueueFull, Refused, Request, TooLong, UnknownModel
from qlora_jax.serve.runner import Runner
from qlora_jax.serve.scheduler import Scheduler
from qlora_jax.serve.sizes import Base, Sizes
from qlora_jax.serve.view import State, View, adapter_views, slot_views

log = logging.getLogger("qlora_jax.serve")
# How many names an error lists.
LISTED = 20
# Steps that may fail, with no request answered in between, before the engine gives up.
FAULTS = 3


class Ticket:
    """A request that the engine has taken."""

    def __init__(self, engine: "Engine", job: Job):
        self._engine, self._job = engine, job

    def cancel(self) -> None:
        """Ends the request before the next step; a Finished("cancelled") still comes. From any thread, at any time."""
        self._job.cancelled = True
        self._engine.wake()


class Engine:
    """Serves one base and any number of its adapters.

    Args:
      base: the model.
      adapters: closed together with the engine.
      sizes: of what the device holds; those of host memory are the store's.

    Raises:
      ValueError: texts longer than the model was made for, or more than the GPU has room for.
    """

    def __init__(self, base: Base, adapters: AdapterStore, sizes: Sizes):
        _check_length(base.config, sizes.max_length)
        self.config, self.base_name, self.adapters = base.config, base.name, adapters
        self.max_length, self.queue = sizes.max_length, sizes.queue
        runner = Runner(
            base,
            rows=sizes.slots,
            max_length=sizes.max_length,
            slots=sizes.max_loras,
            rank=adapters.limits.rank,
            expert_rank=adapters.limits.expert_rank,
        )
        log.info(f"memory on the device: {runner.needs}, and each step's own")
        self._lock = threading.Condition()
        self._scheduler = Scheduler(runner, adapters, FairQueue(sizes.queue), self._lock, base.stop_ids)
        self._state: State = "starting"
        self._error = ""
        self._changed = self._busy = self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        adapters.changed = self.wake
        adapters.on_device = lambda key: self._scheduler.device.find(key) is not None

    def start(self) -> None:
        """Compiles everything that serving needs, then begins to serve. Raises what went wrong."""
        self._thread.start()
        with self._lock:
            self._lock.wait_for(lambda: self._state != "starting")
        if self._state == "dead":
            raise RuntimeError(f"the engine does not start: {self._error}")

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; its events come to `listener` on the engine's thread. Never blocks.

        Raises:
          UnknownModel: no adapter of that name is served.
          TooLong: prompt and new tokens are more than a row holds.
          QueueFull: too many requests wait already.
          Draining: nothing new is taken.
          ValueError: a value that no request may have.
        """
        self._check(request)
        want = None if request.adapter is None else self._want(request.adapter)
        job = Job(request, listener, want)
        with self._lock:
            try:
                self._admit(job)
            except Refused:
                if want:
                    self.adapters.release(want)
                raise
            self._changed = True
            self._lock.notify_all()
        return Ticket(self, job)

    def wake(self) -> None:
        """Has the engine look at what has changed."""
        with self._lock:
            self._changed = True
            self._lock.notify_all()

    def models(self) -> list[tuple[str, str | None]]:
        """Every name that is served, with its parent: the base first, which has none."""
        return [(self.base_name, None), *((name, self.base_name) for name in self.adapters.names())]

    def load_adapter(self, name: str, folder: str | None = None) -> None:
        """Serves the adapter in the adapters' subfolder `folder`, `name` where None, as `name`. Reads it at once.

        Raises:
          UnknownModel: no such subfolder.
          ValueError: a name that cannot be given.
          Refused: an adapter that cannot be served.
        """
        if name == self.base_name:
            raise ValueError(f"{name!r} is the base: choose another name")
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Takes no new request for an adapter, until it is loaded again; running ones go on. Raises UnknownModel."""
        try:
            self.adapters.unload(name)
        except UnknownModel as error:
            raise self._unknown(error) from None

    def view(self) -> View:
        """What is going on now."""
        scheduler = self._scheduler
        with self._lock:
            counters, waiting = dict(scheduler.counters), len(scheduler.queue)
            state, error = self._state, self._error
        counters |= {
            "loads": self.adapters.loads,
            "evictions": scheduler.device.evictions,
            "compilations": scheduler.runner.compiled,
        }
        adapters = adapter_views(self.adapters, list(scheduler.device.slots))
        return View(state, error, slot_views(scheduler.rows), waiting, adapters, counters, self.adapters.broken())

    def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits for all that was taken; False where `timeout` seconds do not suffice."""
        with self._lock:
            if self._state == "serving":
                self._state = "draining"
            return self._lock.wait_for(lambda: self._idle or self._state in ("dead", "closed"), timeout)

    def close(self) -> None:
        """Ends the engine's threads. Requests that have not ended fail."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.adapters.close()

    @property
    def _idle(self) -> bool:
        return not self._busy and not self._changed and not len(self._scheduler.queue)

    def _run(self) -> None:
        try:
            self._scheduler.runner.warm_up()
        except Exception as error:
            log.exception("The engine could not compile its programs")
            return self._end("dead", f"{type(error).__name__}: {error}")
        self._become("serving")
        faults = answered = 0
        while self._awaited():
            try:
                busy = self._scheduler.step()
            except Exception as error:
                busy = True
                before, answered = answered, self._scheduler.answered
                faults = faults + 1 if answered == before else 1
                log.exception("A step failed")
                if not self._recovered(error, faults):
                    return
            with self._lock:
                self._busy = busy
                self._lock.notify_all()
        self._end("closed", "the server is shutting down")

    def _awaited(self) -> bool:
        """Waits until there is something to do; False at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._busy or self._changed or self._closing)
            self._changed, self._busy = False, True
            return not self._closing

    def _recovered(self, error: Exception, faults: int) -> bool:
        """After a failed step, whose arguments are gone: ends what was running, and starts from an empty device."""
        words = f"{type(error).__name__}: {error}"
        try:
            self._scheduler.fail(words, waiting=False)
            if faults < FAULTS:
                self._scheduler.runner.reset()
                return True
        except Exception:
            log.exception("The engine could not recover")
        self._end("dead", words)
        return False

    def _end(self, state: State, error: str) -> None:
        with self._lock:
            self._state, self._error = state, error if state == "dead" else ""
        self._scheduler.fail(error, waiting=True)
        with self._lock:
            self._busy = self._changed = False
            self._lock.notify_all()

    def _become(self, state: State) -> None:
        with self._lock:
            if self._state == "starting":
                self._state = state
            self._lock.notify_all()

    def _check(self, request: Request) -> None:
        """Refuses what does not depend on the engine's state."""
        if not request.prompt:
            raise ValueError("prompt: at least one token is needed")
        odd = [token for token in request.prompt if not 0 <= token < self.config.vocab_size]
        if odd:
            raise ValueError(f"prompt: {odd[0]} is no token of this model, which has {self.config.vocab_size}")
        least = 0 if request.score_prompt else 1
        if request.max_new_tokens < least:
            raise ValueError(f"max_new_tokens must be at least {least}, got {request.max_new_tokens}")
        if not 0 <= (request.top_logprobs or 0) <= TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must be from 0 to {TOP_LOGPROBS}, got {request.top_logprobs}")
        prompt, new = len(request.prompt), request.max_new_tokens
        if prompt + new > self.max_length:
            raise TooLong(
                f"the prompt has {prompt} tokens and {new} more are asked for, {prompt + new} together: at most "
                f"{self.max_length} are served: shorten the prompt or ask for fewer"
            )

    def _want(self, name: str) -> Want:
        try:
            return self.adapters.want(name)
        except UnknownModel as error:
            raise self._unknown(error) from None

    def _unknown(self, error: UnknownModel) -> UnknownModel:
        names = [name for name, _ in self.models()]
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        return UnknownModel(f"{error}: these are: {', '.join(names[:LISTED])}{more}", error.reason)

    def _admit(self, job: Job) -> None:
        """Puts a job into the queue. The lock is held."""
        if self._state == "dead":
            raise Refused(f"the engine has stopped after a fault ({self._error}): start the server again")
        if self._state != "serving":
            raise Draining("the server takes no new requests: it is starting or shutting down")
        queue = self._scheduler.queue
        if len(queue) >= queue.limit:
            seconds = self._retry_after()
            raise QueueFull(f"{len(queue)} requests wait already: try again in {seconds:.0f} s", seconds)
        self._scheduler.counters["requests"] += 1
        queue.add(job)

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is free: as long as a request takes, shared among the rows; 1 at least."""
        return max(1.0, self._scheduler.seconds / len(self._scheduler.rows))


def _check_length(config: ModelConfig, max_length: int) -> None:
    if max_length > config.max_position:
        raise ValueError(f"max_length={max_length}: this model has {config.max_position} positions, take at most those")
