"""However busy one adapter is, another waits for a bounded number of its requests, not for a pause in them."""

import threading
import time

import pytest

from qlora_jax.serve.request import Finished, Request
from tests.serve.parts import ask, make_engine, prompt

LONGEST = 6


class Flood:
    """Keeps `count` requests for an adapter under way: each that ends asks anew."""

    def __init__(self, engine, name, count):
        self.engine, self.name, self.ended, self.over = engine, name, [], threading.Event()
        for seed in range(count):
            self.submit(seed)

    def submit(self, seed):
        request = Request(prompt=tuple(prompt(seed, 4)), adapter=self.name, max_new_tokens=LONGEST, seed=seed)
        self.engine.submit(request, lambda event: self.heard(event, seed))

    def heard(self, event, seed):
        if isinstance(event, Finished):
            self.ended.append(event.reason)
            if not self.over.is_set():
                self.submit(seed)


def until(condition, seconds=120.0):
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def is_read(engine, name):
    return any(adapter.name == name and adapter.where != "disk" for adapter in engine.view().adapters)


@pytest.mark.parametrize("rows, places", [(1, 1), (4, 3)])
def test_a_busy_adapter_does_not_keep_others_out(base, adapters, rows, places):
    """One place in host memory, which the busy adapter's waiting requests would hold for ever."""
    engine = make_engine(base, adapters, slots=rows, max_loras=places, queue=32, host_adapters=1)
    engine.start()
    flood = Flood(engine, "all5", 12)
    until(lambda: len(flood.ended) >= 6)
    rounds = []
    for name in ("q1", "o8", "qv2", "q1", "o8"):
        heard = ask(engine, prompt(1), name, new=2)
        # While it is read the flood goes on; how far depends on the machine, so it is counted from then on.
        until(lambda name=name: is_read(engine, name))
        before = len(flood.ended)
        assert heard.finished().reason == "length"
        rounds.append(len(flood.ended) - before)
    flood.over.set()
    assert max(rounds) <= 4 * rows, rounds
    assert set(flood.ended) == {"length"}
    engine.close()
