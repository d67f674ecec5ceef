"""Models that keep states instead of keys and values: what is served is what each text gives alone."""

import pytest

from tests.serve.parts import RANK, alone, ask, make_engine, prompt, stop_within, write_random_adapter

pytest.importorskip("torch")
checkpoints = pytest.importorskip("tests.families.checkpoints")

FAMILIES = ("qwen3_5_text", "lfm2")


@pytest.fixture(scope="module", params=FAMILIES)
def hybrid(request, tmp_path_factory):
    """A base, a folder with two adapters, and `answers(name, prompt, new)` by Generator."""
    out = tmp_path_factory.mktemp("hybrid")
    base = checkpoints.make(out, request.param)
    write_random_adapter(out / "adapters" / "all", base, 1, rank=3, targets="all-linear")
    write_random_adapter(out / "adapters" / "out", base, 2, rank=RANK, targets=("out_proj",))
    generators = {}

    def answers(name, prompt, new=8):
        if name not in generators:
            generators[name] = alone(base, name and out / "adapters" / name)
        return generators[name].generate([prompt], max_new_tokens=[new])[0]

    return base, out / "adapters", answers


@pytest.fixture(scope="module")
def engine(hybrid):
    base, adapters, _ = hybrid
    engine = make_engine(base, adapters, slots=3)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def single(hybrid):
    """An engine with one row."""
    base, adapters, _ = hybrid
    engine = make_engine(base, adapters, slots=1)
    engine.start()
    yield engine
    engine.close()


@pytest.mark.parametrize("sizes", [None, [16]], ids=["whole prompts", "pieces"])
def test_mixed_texts_are_as_each_alone(engine, hybrid, monkeypatch, sizes):
    """Rows idle beside rows that are read and written, and are taken by one text after another."""
    runner, answers = engine._scheduler.runner, hybrid[2]
    monkeypatch.setattr(runner, "sizes", sizes or runner.sizes)
    names = [None, "all", "out", "all", None, "out", "all", None]
    asked = []
    for seed, name in enumerate(names):
        text, new = prompt(seed, 3 + 7 * (seed * 5 % 7)), 3 + seed * 3 % 8
        asked.append((ask(engine, text, name, new=new), name, text, new))
    for heard, name, text, new in asked:
        assert heard.finished().reason == "length", heard.end
        assert heard.ids == answers(name, text, new)
    assert len({tuple(heard.ids[:3]) for heard, *_ in asked}) > 4


def check(engine, hybrid, text, cached, name="all"):
    """The text's answer is that which it gives alone, and so many of its tokens need not be read."""
    heard = ask(engine, text, name)
    assert heard.finished().cached == cached
    assert heard.ids == hybrid[2](name, text)


def test_only_a_text_that_goes_on_from_a_state_uses_it(single, hybrid):
    first = prompt(1, 20)
    answer = hybrid[2]("all", first)
    check(single, hybrid, first, 0)
    kept = len(first) + len(answer) - 1  # the last token has not been read
    check(single, hybrid, first + answer + [7, 9], kept)
    check(single, hybrid, first + answer, 0)  # more is in the state than this text shares
    check(single, hybrid, first[:10] + [7, 9], 0)
    check(single, hybrid, first[:10] + [7, 9], 0)
    before = single.view().counters["cached_tokens"]
    check(single, hybrid, [*first[:10], 7, 9, *hybrid[2]("all", first[:10] + [7, 9]), 3], 19)
    assert single.view().counters["cached_tokens"] == before + 19


def test_another_adapter_does_not_use_a_state(single, hybrid):
    text = prompt(2, 9)
    check(single, hybrid, text, 0, "out")
    check(single, hybrid, [*text, *hybrid[2]("out", text), 5], 0, None)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_text_that_stopped_has_read_its_stop_token(single, hybrid, monkeypatch, goes_on):
    text = prompt(3, 9)
    stop = stop_within(single, hybrid[2]("all", text), monkeypatch)
    heard = ask(single, text, "all")
    assert heard.finished().reason == "stop"
    monkeypatch.setattr(single._scheduler, "stop_ids", frozenset())
    read = len(text) + len(heard.ids) + 1
    check(single, hybrid, [*text, *heard.ids, stop if goes_on else stop - 1, 7, 9], read if goes_on else 0)


def test_what_a_cancelled_text_left_is_what_its_row_says(single, hybrid):
    text = prompt(4, 9)
    heard = ask(single, text, "all", new=50)
    heard.wait(lambda heard: len(heard.ids) >= 3)
    heard_ticket = single._scheduler.rows[0].job
    heard_ticket.cancelled = True
    assert heard.finished().reason == "cancelled"
    left = list(single._scheduler.rows[0].tokens)
    assert left[: len(text)] == text and len(left) > len(text) + 2
    check(single, hybrid, [*left, 7, 9], len(left))


def test_a_scored_prompt_begins_anew(single, hybrid):
    text = prompt(5, 9)
    check(single, hybrid, text, 0)
    longer = [*text, *hybrid[2]("all", text), 7]
    heard = ask(single, longer, "all", score_prompt=True)
    assert heard.finished().cached == 0
    assert heard.ids == hybrid[2]("all", longer) and len(heard.scored) == len(longer)


def test_the_states_are_counted(single):
    runner = single._scheduler.runner
    kinds = {type(layers).__name__ for layers in runner.texts.values()}
    assert "KeyValues" in kinds and len(kinds) == 2
    assert runner.needs.texts == sum(leaf.nbytes for layers in runner.texts.values() for leaf in layers)
