"""What a checkpoint assumes: that a run goes on as it was begun."""

import dataclasses

import numpy as np
import pytest

from qlora_jax.config import Config, OptimSection, TrainSection, to_dict
from qlora_jax.data import Encoded, load_tokenizer
from qlora_jax.training.assumptions import assumptions, changes
from qlora_jax.training.dataset import Dataset, random_tokens
from tests.cli.tiny import write_tokenizer

IDS, SCORED = np.arange(6, dtype=np.int32), np.arange(6) > 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


def config_of(schedule="constant", steps=100, **optim) -> Config:
    return Config(
        optim=OptimSection(schedule=schedule, **optim), train=TrainSection(steps=steps, batch_size=1, seq_len=8)
    )


def dataset_of(documents, eval_documents=()) -> Dataset:
    made = random_tokens(config_of(), 10)
    return Dataset(batches=dataclasses.replace(made.batches, encoded=documents), eval_documents=eval_documents)


def encoded(ids=IDS, scored=SCORED) -> Encoded:
    return Encoded(ids=np.array(ids, np.int32), scored=np.array(scored))


def found(was, now, tokenizer, *, config=None, before=None) -> list[str]:
    """What has changed between two datasets, at step 1."""
    config = config or config_of()
    meta = {"step": 1, "assumes": assumptions(was, tokenizer, 100), "config": to_dict(before or config)}
    return changes(meta, assumptions(now, tokenizer, 100), config)


OTHERS = {
    "an id": [encoded([9, *IDS[1:]]), encoded()],
    "the mask alone": [encoded(scored=IDS > 3), encoded()],
    "one row less": [encoded()],
    "one more": [encoded()] * 3,
    "the order": [encoded(), encoded(IDS[:5], SCORED[:5])],
    "where a row ends": [encoded(IDS[:5], SCORED[:5]), encoded([5, *IDS], [True, *SCORED])],
}


@pytest.mark.parametrize("rows", OTHERS.values(), ids=OTHERS)
def test_rows_are_others_by_any_id_or_mask(rows, tokenizer):
    same = [encoded(IDS[:5], SCORED[:5]), encoded()] if rows is OTHERS["the order"] else [encoded(), encoded()]
    assert found(dataset_of(same), dataset_of(list(same)), tokenizer) == []
    [line] = found(dataset_of(same), dataset_of(rows), tokenizer)
    assert line.startswith("the training rows are others (2 with ")
    [line] = found(dataset_of(same, same), dataset_of(same, rows), tokenizer)
    assert line.startswith("the evaluation rows are others (2 with ")


def test_evaluation_rows_may_be_more_where_that_was_asked_for(tokenizer):
    was, now = dataset_of([encoded()], [encoded()]), dataset_of([encoded()], [encoded()] * 2)
    more = dataclasses.replace(config_of(), train=dataclasses.replace(config_of().train, eval_rows=2))
    assert found(was, now, tokenizer, config=more, before=config_of()) == []


def test_the_cause_is_named(tokenizer, tmp_path):
    was, now = dataset_of([encoded()]), dataset_of([encoded(IDS[:4], SCORED[:4])])
    meta = {"step": 1, "assumes": assumptions(was, tokenizer, 100), "config": to_dict(config_of())}
    write_tokenizer(tmp_path, more=1)
    other = load_tokenizer(str(tmp_path))
    other.chat_template = "{{ messages }}"
    [line] = changes(meta, assumptions(now, other, 100), config_of())
    assert line.endswith("4 tokens now; the chat template and the tokenizer changed)")
    # A template that these rows do not show is still another one to answer with.
    assert changes(meta, assumptions(was, other, 100), config_of()) == ["the chat template is another"]


def test_what_calls_leave_in_a_tokenizer_does_not_count(tokenizer):
    data = dataset_of([encoded()])
    before = assumptions(data, tokenizer, 1)
    tokenizer("some text", truncation=True, max_length=3)
    assert assumptions(data, tokenizer, 1) == before


@pytest.mark.parametrize(
    "schedule, warmup, planned, step, steps, bent",
    [
        ("constant", 0.0, 100, 100, 200, False),
        ("constant", 0.03, 100, 50, 70, False),  # warmed up in both
        ("constant", 0.5, 100, 10, 200, True),  # in the middle of it
        ("linear", 0.0, 100, 100, 200, True),
        ("linear", 0.0, 100, 30, 60, True),
        ("cosine", 0.03, 100, 100, 101, True),
        ("cosine", 0.03, 100, 40, 100, False),
        ("cosine", 0.03, 100, 100, 100, False),
        ("cosine", 0.03, 100, 40, 80, True),
    ],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
def test_the_learning_rate_goes_on_as_planned(schedule, warmup, planned, step, steps, bent, recorded, tokenizer):
    data = dataset_of([encoded()])
    before, now = (config_of(schedule, n, warmup_ratio=warmup) for n in (planned, steps))
    meta = {"step": step, "config": to_dict(before)}
    if recorded:
        meta["assumes"] = assumptions(data, tokenizer, planned)
    lines = changes(meta, assumptions(data, tokenizer, steps), now)
    assert len(lines) == bent
    assert all(f"step {step + 1} was to be " in line and "is " in line for line in lines)


def test_an_earlier_version_recorded_epochs(tokenizer):
    data = dataset_of([encoded()])
    two = dataclasses.replace(config_of("cosine"), train=TrainSection(epochs=2.0, batch_size=1, seq_len=8))
    planned = 2 * len(data.batches)
    meta = {"step": 1, "config": to_dict(two)}
    assert changes(meta, assumptions(data, tokenizer, planned), two) == []
    assert len(changes(meta, assumptions(data, tokenizer, planned + 1), two)) == 1


def test_random_tokens_have_no_tokenizer():
    data = random_tokens(config_of(), 10)
    assert assumptions(data, None, 3)["tokenizer"] is None
