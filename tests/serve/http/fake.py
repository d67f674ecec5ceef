"""An engine without a model: each adapter has a text that it says, whatever the prompt."""

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence

from qlora_jax.serve.request import (
    Draining,
    Finished,
    Listener,
    PromptScored,
    QueueFull,
    Refused,
    Request,
    Token,
    TooLong,
    UnknownModel,
)
from qlora_jax.serve.view import AdapterView, SlotView, View

BASE = "demo-base"
MAX_LENGTH = 200


class Ticket:
    """A request, and how far it has come."""

    def __init__(self, engine: "FakeEngine", request: Request, listener: Listener, script: Sequence[int]):
        self.engine, self.request, self.listener = engine, request, listener
        self.script, self.said, self.cancelled = script, 0, False

    def cancel(self) -> None:
        with self.engine.wake:
            if self in self.engine.running or self in self.engine.waiting:
                self.cancelled = True
            self.engine.wake.notify_all()

    def step(self) -> bool:
        """One token, or the end; says whether it goes on."""
        request = self.request
        if self.cancelled:
            self.listener(Finished("cancelled"))
        elif request.adapter == "broken":
            self.listener(Finished("failed", error="the adapter is broken"))
        elif request.adapter == "poisoned":
            self.listener(Finished("failed", error="its weights are not finite", refused=True))
        elif request.adapter == "dying" and self.said == 1:
            self.listener(Finished("failed", error="the adapter died"))
        elif self.said == 0 and request.score_prompt:
            self.listener(PromptScored(tuple(self._scored(i, token) for i, token in enumerate(request.prompt))))
            request = self.request = dataclasses.replace(request, score_prompt=False)
            return True
        elif self.said >= request.max_new_tokens:
            self.listener(Finished("length", cached=len(request.prompt) // 2))
        elif self.said >= len(self.script):
            end = Token(2, -0.5, ((2, -0.5),)) if request.top_logprobs is not None else None
            self.listener(Finished("stop", cached=len(request.prompt) // 2, token=end))
        else:
            self.listener(self._scored(self.said + 1, self.script[self.said]))
            self.said += 1
            return True
        return False

    def _scored(self, place: int, token: int) -> Token:
        """Log probabilities that tell the place: -place; the runner-up one below."""
        count = self.request.top_logprobs
        if count is None or place == 0:
            return Token(token)
        likeliest = [(token, -float(place)), *((5 + i, -float(place) - 1 - i) for i in range(20))]
        return Token(token, -float(place), tuple(likeliest[:count]))


class FakeEngine:
    """Says `scripts[adapter]`, a token a turn; `scripts[None]` is the base's. Holding `gate` shut makes it wait.

    Adapters "broken" (fails), "dying" (fails after a token), "poisoned" (is refused) and those of `scripts` are served;
    load_adapter adds what the base says.
    """

    def __init__(self, scripts: dict[str | None, Sequence[int]], *, slots: int = 4, queue: int = 64):
        self.scripts, self.slots, self.queue = dict(scripts), slots, queue
        self.wake, self.gate = threading.Condition(), threading.Event()
        self.gate.set()
        self.running: list[Ticket] = []
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self.pace = 0.0  # seconds a turn
        self.draining = self.closed = False
        self.state, self.error = "serving", ""
        threading.Thread(target=self._loop, daemon=True).start()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        with self.wake:
            if self.draining:
                raise Draining("the server is shutting down")
            if self.state == "dead":
                raise Refused("the engine has stopped")
            if request.adapter not in self.scripts and request.adapter not in ("broken", "poisoned", "dying"):
                raise UnknownModel(f"no adapter {request.adapter!r}")
            if len(request.prompt) + request.max_new_tokens > MAX_LENGTH:
                raise TooLong(
                    f"the prompt's {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                    f"exceed {MAX_LENGTH}"
                )
            if len(self.waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests are waiting already", retry_after=1.4)
            script = self.scripts.get("poet" if request.adapter == "dying" else request.adapter, ())
            ticket = Ticket(self, request, listener, script)
            self.requests.append(request)
            self.tickets.append(ticket)
            self.waiting.append(ticket)
            self.wake.notify_all()
            return ticket

    def _loop(self) -> None:
        while not self.closed:
            self.gate.wait()
            time.sleep(self.pace)
            with self.wake:
                while self.waiting and len(self.running) < self.slots:
                    self.running.append(self.waiting.popleft())
                if not self.running:
                    self.wake.wait(0.05)
                self.running = [ticket for ticket in self.running if ticket.step()]
                self.wake.notify_all()

    def view(self) -> View:
        with self.wake:
            busy = [SlotView("writing", ticket.request.adapter, ticket.said, 3) for ticket in self.running]
            free = [SlotView("free", None, 0, 0)] * (self.slots - len(busy))
            names = [name for name in self.scripts if name]
            adapters = tuple(AdapterView(name, name.encode().hex(), 8, "device", 0) for name in names)
            return View(self.state, self.error, (*busy, *free), len(self.waiting), adapters, {"steps": 3})

    def models(self) -> list[tuple[str, str | None]]:
        return [(BASE, None), *((name, BASE) for name in self.scripts if name)]

    def load_adapter(self, name: str, folder: str | None = None) -> None:
        if (folder or name) != "new":
            raise ValueError(f"no adapter folder {folder or name!r}")
        self.scripts[name] = self.scripts[None]

    def unload_adapter(self, name: str) -> None:
        if self.scripts.pop(name, None) is None:
            raise UnknownModel(f"no adapter {name!r}")

    def drain(self, timeout: float) -> bool:
        with self.wake:
            self.draining = True
            return self.is_idle(timeout)

    def is_idle(self, timeout: float = 10.0) -> bool:
        """Waits until nothing runs or waits."""
        with self.wake:
            return self.wake.wait_for(lambda: not self.running and not self.waiting, timeout)

    def close(self) -> None:
        self.closed = True
        self.gate.set()
