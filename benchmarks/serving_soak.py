"""Thousands of requests with random adapters, cancellations and reloads: is every answer its own adapter's?

    python benchmarks/serving_soak.py --requests 10000

Runs on the bundled base, on a CPU in some minutes. Exit code 1 where an answer was another adapter's, a slot was not
given back, or something was compiled after warm-up.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_adapters import alone, write_random_adapter  # noqa: E402
from qlora_jax.config import QuantSection  # noqa: E402
from qlora_jax.io.hf import LoadedModel, load_model  # noqa: E402
from qlora_jax.quant.rules import rules_for  # noqa: E402
from qlora_jax.serve import Engine, open_engine  # noqa: E402
from qlora_jax.serve.engine import Ticket  # noqa: E402
from qlora_jax.serve.request import Event, Finished, QueueFull, Request, Token, TooLong, UnknownModel  # noqa: E402

BASE = ROOT / "demo" / "base"
RANK, LENGTH, NEW, VERSIONS = 12, 64, 12, 2
LORAS: tuple[dict[str, Any], ...] = (
    dict(rank=1, targets=("q_proj",)),
    dict(rank=2, targets=("q_proj", "v_proj")),
    dict(rank=3, targets="all-linear"),
    dict(rank=4, targets=("gate_proj", "up_proj", "down_proj"), alpha=2.0),
    dict(rank=5, targets="all-linear", variant="rslora"),
    dict(rank=8, targets=("o_proj",)),
    dict(rank=12, targets="all-linear", alpha=4.0),
    dict(rank=2, targets="all-linear", rank_pattern={"q_proj": 7, "down_proj": 11}),
)
PROMPTS = [[2 + (7 * i + 13 * j) % 200 for j in range(3 + 5 * i)] for i in range(6)]
# Prompts that begin alike, so that keys and values are used again.
PROMPTS += [PROMPTS[3] + [9, 8, 7], PROMPTS[3][:7] + [5]]


class Sent:
    """A request on its way: what it asked for, and what came."""

    def __init__(self, name: str | None, prompt: int, new: int, version: int, done: threading.Semaphore):
        self.name, self.prompt, self.new, self.version = name, prompt, new, version
        self.ids: list[int] = []
        self.end: Finished | None = None
        self.done = done
        self.ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        assert self.end is None, f"{event} after {self.end}"
        if isinstance(event, Token):
            self.ids.append(event.id)
        elif isinstance(event, Finished):
            self.end = event
            self.done.release()


class Soak:
    """An engine, its adapters in `folder`, and what each version of each of them answers to each prompt.

    An adapter is a link to one of its versions: a link is replaced in one instant.
    """

    def __init__(self, base: Path, folder: Path, seed: int, loras=LORAS):
        self.random, self.folder = random.Random(seed), folder
        self.names = [f"a{i}" for i in range(len(loras))]
        self.version = dict.fromkeys(self.names, 0)
        self.unloaded: set[str] = set()
        loaded = load_model(base, dtype="float32", rules=rules_for("nf4", QuantSection()))
        for number, (name, lora) in enumerate(zip(self.names, loras, strict=True)):
            for version in range(VERSIONS):
                write_random_adapter(self._place(name, version), loaded, 10 * number + version, **lora)
            self._point(name, 0)
        self.expected = self._answers(loaded)
        self.engine = self._engine(base)
        self.failed: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def _place(self, name: str, version: int) -> Path:
        return self.folder / f".{name}.{version}"

    def _point(self, name: str, version: int) -> None:
        link = self.folder / f".{name}.link"
        link.symlink_to(self._place(name, version))
        os.replace(link, self.folder / name)

    def _engine(self, base: Path) -> Engine:
        return open_engine(
            base,
            self.folder,
            base_name="base",
            stop_ids=[],
            quant="nf4",
            dtype="fp32",
            slots=6,
            max_loras=3,
            max_rank=RANK,
            max_length=LENGTH,
            queue=24,
            host_adapters=4,
        )

    def _answers(self, loaded: LoadedModel) -> dict[tuple[str | None, int, int], list[int]]:
        found: dict[tuple[str | None, int, int], list[int]] = {}
        for name in (None, *self.names):
            for version in range(VERSIONS if name else 1):
                generator = alone(loaded, self._place(name, version) if name else None, RANK)
                for number, prompt in enumerate(PROMPTS):
                    [found[name, version, number]] = generator.generate([prompt], max_new_tokens=NEW)
        return found

    def run(self, requests: int) -> dict[str, Any]:
        """Sends so many requests, waits for all and gives the report."""
        self.engine.start()
        before, began = self.engine.view().counters["compilations"], time.perf_counter()
        done, sent = threading.Semaphore(0), []
        for _ in range(requests):
            self._disturb(sent)
            sent.append(self._send(done))
        for one in sent:
            if one and not done.acquire(timeout=120):
                self.failed.append("a request never ended")
                break
        seconds, view = time.perf_counter() - began, self.engine.view()
        for one in filter(None, sent):
            self._judge(one)
        leaked = sum(adapter.users for adapter in view.adapters) + view.waiting
        leaked += sum(slot.state != "free" for slot in view.slots)
        self.engine.close()
        return {
            "requests": requests,
            "seconds": round(seconds, 1),
            "ends": dict(sorted(self.counts.items())),
            "wrong": len(self.failed),
            "first wrong": self.failed[:3],
            "leaked": leaked,
            "compiled after warm-up": view.counters["compilations"] - before,
            "counters": dict(sorted(view.counters.items())),
        }

    def _send(self, done: threading.Semaphore) -> Sent | None:
        name = self.random.choice([None, *self.names])
        one = Sent(name, self.random.randrange(len(PROMPTS)), self.random.randint(1, NEW), self._now(name), done)
        if self.random.random() < 0.02:
            return self._refused(Request(prompt=(1,) * LENGTH, max_new_tokens=1, adapter=name), (TooLong, UnknownModel))
        request = Request(prompt=tuple(PROMPTS[one.prompt]), max_new_tokens=one.new, adapter=name)
        if name in self.unloaded:
            return self._refused(request, (UnknownModel,))
        while True:
            try:
                one.ticket = self.engine.submit(request, one)
                return one
            except QueueFull:
                self.counts["queue full"] += 1
                time.sleep(0.002)

    def _refused(self, request: Request, errors: tuple[type[Exception], ...]) -> None:
        try:
            self.engine.submit(request, lambda event: None)
        except errors:
            self.counts["refused"] += 1
        else:
            self.failed.append(f"{request} was taken")

    def _now(self, name: str | None) -> int:
        return self.version[name] if name else 0

    def _disturb(self, sent: list[Sent | None]) -> None:
        """Now and then: a cancellation, another version under the same name, an adapter unloaded or loaded again."""
        if sent and self.random.random() < 0.1:
            one = self.random.choice(sent[-20:])
            if one and one.ticket:
                one.ticket.cancel()
        name = self.random.choice(self.names)
        if self.random.random() < 0.02:
            self.version[name] += 1
            self._point(name, self.version[name] % VERSIONS)
            self.counts["versions"] += 1
        if name in self.unloaded and self.random.random() < 0.1:
            self.engine.load_adapter(name)
            self.unloaded.discard(name)
        elif name not in self.unloaded and self.random.random() < 0.01:
            self.engine.unload_adapter(name)
            self.unloaded.add(name)

    def _judge(self, one: Sent) -> None:
        """An answer has to be that of the version that was there when the request came, or of one that came after."""
        if one.end is None:
            return
        self.counts[one.end.reason] += 1
        versions = range(one.version, min(self._now(one.name), one.version + VERSIONS - 1) + 1)
        right = [self.expected[one.name, version % VERSIONS if one.name else 0, one.prompt] for version in versions]
        whole = one.end.reason == "length" and len(one.ids) == one.new
        part = one.end.reason == "cancelled" and len(one.ids) <= one.new
        if not (whole or part) or not any(answer[: len(one.ids)] == one.ids for answer in right):
            self.failed.append(f"{one.name} version {one.version}, prompt {one.prompt}: {one.end}, {one.ids}: {right}")


def main() -> int:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=BASE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Soak(options.model, Path(folder), options.seed).run(options.requests)
    print(json.dumps(report, indent=2))
    return int(bool(report["wrong"] or report["leaked"] or report["compiled after warm-up"]))


if __name__ == "__main__":
    sys.exit(main())
