"""The device gets its next step before the last one's tokens are known: nothing of that is seen from outside."""

import pytest

from qlora_jax.serve import scheduler
from qlora_jax.serve.request import Finished
from tests.serve.parts import ADAPTERS, ask, make_engine, prompt, stop_within


@pytest.fixture
def single(base, adapters):
    """An engine with one row."""
    engine = make_engine(base, adapters, slots=1)
    engine.start()
    yield engine
    engine.close()


def test_a_step_is_started_before_the_last_ones_tokens_are_waited_for(single, monkeypatch):
    order, decode, fetch = [], single._scheduler.runner.decode, scheduler.fetch
    monkeypatch.setattr(single._scheduler.runner, "decode", lambda rows: order.append("decode") or decode(rows))
    monkeypatch.setattr(scheduler, "fetch", lambda arrays: order.append("fetch") or fetch(arrays))
    heard = ask(single, prompt(1), new=5)
    assert heard.finished().reason == "length"
    assert order == ["fetch", "decode", *["decode", "fetch"] * 3, "fetch"]  # the first fetch is the prompt's


def test_texts_that_stop_end_where_they_do_alone(engine, alone_answers, monkeypatch):
    """More requests than rows: a row's next text begins while a step of the last one, which stopped, is under way."""
    names = [None, *ADAPTERS, None, *ADAPTERS]
    expected = [alone_answers(name, prompt(seed), 12) for seed, name in enumerate(names)]
    stops = frozenset(ids[2 + seed % 7] for seed, ids in enumerate(expected))
    monkeypatch.setattr(engine._scheduler, "stop_ids", stops)
    asked = [ask(engine, prompt(seed), name, new=12) for seed, name in enumerate(names)]
    for heard, ids in zip(asked, expected, strict=True):
        assert heard.finished().reason == "stop"
        assert heard.ids == ids[: next(place for place, token in enumerate(ids) if token in stops)]
    assert all(sum(isinstance(event, Finished) for event in heard.events) == 1 for heard in asked)


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_was_read_too_far_is_the_stop_token(single, alone_answers, monkeypatch, goes_on):
    expected = alone_answers("all3", prompt(1), 8)
    stop = stop_within(single, expected, monkeypatch)
    first = ask(single, prompt(1), "all3", new=8)
    assert first.finished().reason == "stop"
    monkeypatch.setattr(single._scheduler, "stop_ids", frozenset())
    longer = prompt(1) + first.ids + [stop if goes_on else stop - 1, 7, 9]
    again = ask(single, longer, "all3", new=8)
    assert again.finished().cached == len(prompt(1)) + len(first.ids) + goes_on
    assert again.ids == alone_answers("all3", longer, 8)
    assert isinstance(first.events[-1], Finished)
