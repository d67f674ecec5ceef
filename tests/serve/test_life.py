"""Waiting, cancelling, failing, draining: what happens to requests that do not simply get their answer."""

import jax.numpy as jnp
import pytest
from jax import monitoring

from qlora_jax.serve.request import Draining, QueueFull, Refused, Request
from tests.serve.parts import ADAPTERS, Heard, answer, ask, make_engine, prompt


@pytest.fixture
def small(base, adapters):
    """An engine with one row, one place on the device and room for two that wait."""
    engine = make_engine(base, adapters, slots=1, max_loras=1, queue=2)
    engine.start()
    yield engine
    engine.close()


def long_request(engine, adapter=None):
    """One that occupies a row until it is cancelled: its listener waits."""
    heard, ticket = Heard(), None
    ticket = engine.submit(Request(prompt=(1, 2, 3), adapter=adapter, max_new_tokens=60), heard)
    return heard, ticket


def free(engine):
    return [slot.state for slot in engine.view().slots]


def test_nothing_is_compiled_after_warm_up(engine):
    compiled = []

    def on(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    before = engine.view().counters["compilations"]
    monitoring.register_event_duration_secs_listener(on)
    try:
        for seed, name in enumerate([None, *ADAPTERS]):
            length = 1 + 6 * seed
            ask(engine, prompt(seed, length), name, new=3, top_logprobs=seed, score_prompt=seed % 2 == 0)
        answer(engine, prompt(1, 60), None, new=4, seed=2**63)
        heard, ticket = long_request(engine)
        ticket.cancel()
        heard.finished()
    finally:
        monitoring.unregister_event_duration_listener(on)
    assert compiled == []
    assert engine.view().counters["compilations"] == before


def test_a_cancelled_request_leaves_its_row(small):
    heard, ticket = long_request(small, "q1")
    heard.wait(lambda heard: heard.ids)
    ticket.cancel()
    assert heard.finished().reason == "cancelled"
    assert 0 < len(heard.ids) < 60
    ticket.cancel()  # once more does nothing
    assert len(answer(small, prompt(1))) == 8
    assert sum(isinstance(event, type(heard.end)) for event in heard.events) == 1
    assert [adapter.users for adapter in small.view().adapters if adapter.where == "device"] == [0]


def test_a_waiting_request_can_be_cancelled(small):
    running, first = long_request(small)
    running.wait(lambda heard: heard.ids)
    waiting, second = long_request(small, "q1")
    second.cancel()
    assert waiting.finished().reason == "cancelled"
    assert waiting.ids == []
    first.cancel()
    running.finished()


def test_a_full_queue_says_when_to_come_again(small):
    hold = Heard()
    small.submit(Request(prompt=(1,), max_new_tokens=60), hold)
    hold.wait(lambda heard: heard.ids)
    with pytest.raises(QueueFull, match="2 requests wait already: try again in") as error:
        for _ in range(40):
            long_request(small)
    assert error.value.retry_after >= 1


def test_an_adapter_in_use_is_never_evicted(base, adapters, alone_answers):
    """More rows than places on the device: a request for a second adapter waits until the first is not used."""
    engine = make_engine(base, adapters, slots=3, max_loras=1)
    engine.start()
    asked = [(name, ask(engine, prompt(i), name, new=20)) for i, name in enumerate(["q1", "qv2", "q1", "o8", "q1"])]
    for i, (name, heard) in enumerate(asked):
        assert heard.finished().reason == "length"
        assert heard.ids == alone_answers(name, prompt(i), 20)
    assert engine.view().counters["installs"] >= 3
    engine.close()


def test_a_poisoned_adapter_harms_its_own_requests_only(engine, alone_answers):
    """NaN in one slot of the stacks, past all checks; and in the cache of the row that it had."""
    answer(engine, prompt(1), "all3")
    runner, device = engine._scheduler.runner, engine._scheduler.device
    slot = next(i for i, found in enumerate(device.slots, start=1) if found.name == "all3")
    sound = dict(runner.stacks)
    for path, stack in sound.items():
        runner.stacks[path] = stack._replace(A=stack.A.at[:, slot].set(jnp.nan), B=stack.B.at[:, slot].set(jnp.nan))
    poisoned = ask(engine, prompt(2, 50), "all3")  # longer than what comes after it in its row
    asked = {name: ask(engine, prompt(2), name, new=16) for name in (None, "qv2", "o8")}
    bad = poisoned.finished()
    assert (bad.reason, bad.error[:30]) == ("failed", "the model's scores are not fin")
    for name, heard in asked.items():
        assert heard.finished().reason == "length"
        assert heard.ids == alone_answers(name, prompt(2), 16)
    for seed in range(6):  # every row again, that one too
        assert answer(engine, prompt(seed), "q1") == alone_answers("q1", prompt(seed))
    device.empty(slot)
    assert answer(engine, prompt(2), "all3") == alone_answers("all3", prompt(2))


def test_a_step_that_fails_ends_what_was_running_and_nothing_else(engine, alone_answers, monkeypatch):
    decode, calls = engine._scheduler.runner.decode, []

    def broken(rows):
        calls.append(rows)
        if len(calls) == 3:
            engine._scheduler.runner.texts["layers"].k.delete()  # what a program that fails does to its arguments
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return decode(rows)

    monkeypatch.setattr(engine._scheduler.runner, "decode", broken)
    heard = ask(engine, prompt(1), "q1", new=20)
    end = heard.finished()
    assert (end.reason, end.error) == ("failed", "RuntimeError: RESOURCE_EXHAUSTED: out of memory")
    assert answer(engine, prompt(1), "q1", new=20) == alone_answers("q1", prompt(1), 20)
    assert engine.view().state == "serving"


def test_an_engine_that_fails_again_and_again_is_dead(small, monkeypatch):
    def broken(rows):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(small._scheduler.runner, "decode", broken)
    ends = [heard.finished() for heard in (ask(small, prompt(1)) for _ in range(2))]
    third = ask(small, prompt(1))
    assert {end.error for end in [*ends, third.finished()]} == {"RuntimeError: the device is lost"}
    small._thread.join(10)
    assert (small.view().state, small.view().error) == ("dead", "RuntimeError: the device is lost")
    with pytest.raises(Refused, match="stopped after a fault .the device is lost|stopped after a fault"):
        ask(small, prompt(1))


def test_a_listener_that_raises_harms_nobody_else(engine, alone_answers):
    def bad(event):
        raise KeyError("client is gone")

    engine.submit(Request(prompt=tuple(prompt(1)), max_new_tokens=30), bad)
    assert answer(engine, prompt(2), "q1") == alone_answers("q1", prompt(2))


def test_draining_ends_what_was_taken_and_takes_nothing_new(small):
    running, _ = long_request(small)
    waiting, _ = long_request(small, "q1")
    assert small.drain(60)
    assert (running.finished().reason, waiting.finished().reason) == ("length", "length")
    with pytest.raises(Draining):
        ask(small, prompt(1))
    assert (small.view().state, free(small), small.view().waiting) == ("draining", ["free"], 0)


def test_closing_fails_what_has_not_ended(small):
    running, _ = long_request(small)
    running.wait(lambda heard: heard.ids)
    waiting, _ = long_request(small, "q1")
    assert not small.drain(0)
    small.close()
    assert {running.finished().reason, waiting.finished().reason} <= {"failed", "length"}
    assert small.view().state == "closed"
    with pytest.raises(Draining):
        ask(small, prompt(1))
