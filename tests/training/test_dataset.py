"""The configured data: which rows, through the cache, with their weights."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from qlora_jax.config import Config, DataSection, TrainSection, apply_overrides, from_dict, to_dict
from qlora_jax.data import load_tokenizer
from qlora_jax.training import dataset


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo/base")


@pytest.fixture
def folder(tmp_path):
    for name, texts in {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e"], "more": ["f"]}.items():
        rows = [json.dumps({"text": f"{text} " * 3}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def config_of(train, **data):
    section = TrainSection(seq_len=32, batch_size=1, grad_accum=1)
    return Config(train=section, data=DataSection(train=train, packing=False, **data))


def texts(documents, tokenizer):
    return [tokenizer.decode(one.ids, skip_special_tokens=True).strip()[:1] for one in documents]


def test_a_folder_gives_each_its_own_split(folder, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    prepared = dataset.prepare(config_of(str(folder), eval=str(folder)), tokenizer)
    assert texts(prepared.batches.encoded, tokenizer) == ["a", "b", "c"]
    assert texts(prepared.eval_documents, tokenizer) == ["d"]
    assert caplog.messages == [
        f"rows: {folder}, train split: train.jsonl (3 rows); beside it and not read: more.jsonl (names no split), "
        "test.jsonl (test), validation.jsonl (validation)",
        f"rows: {folder}, validation split: validation.jsonl (1 rows); beside it and not read: more.jsonl (names no "
        "split), test.jsonl (test), train.jsonl (train)",
    ]


def test_a_second_start_reads_what_the_first_encoded(folder, tokenizer, monkeypatch, caplog):
    first = dataset.prepare(config_of(str(folder)), tokenizer)
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "encode_all", None)  # it would fail if it were called
        second = dataset.prepare(config_of(str(folder)), tokenizer)
    assert caplog.messages[-1].endswith("; 3 rows, encoded before")
    for step in range(4):
        for one, other in zip(first.batches.at(step), second.batches.at(step), strict=True):
            np.testing.assert_array_equal(one, other)
    (folder / "train.jsonl").write_text('{"text": "z"}')
    assert texts(dataset.prepare(config_of(str(folder)), tokenizer).batches.encoded, tokenizer) == ["z"]


def test_a_share_of_the_rows_is_held_out(folder, tokenizer):
    prepared = dataset.prepare(config_of(str(folder / "train.jsonl"), eval=0.3), tokenizer)
    assert len(prepared.eval_documents) == 1
    everything = texts(prepared.batches.encoded, tokenizer) + texts(prepared.eval_documents, tokenizer)
    assert sorted(everything) == ["a", "b", "c"]


def test_evaluation_rows_may_be_limited(folder, tokenizer):
    config = config_of(str(folder / "train.jsonl"), eval=str(folder / "train.jsonl"))
    limited = replace(config, train=replace(config.train, eval_rows=2))
    assert texts(dataset.prepare(limited, tokenizer).eval_documents, tokenizer) == ["a", "b"]


def test_several_sources(folder, tokenizer):
    train = [str(folder / "train.jsonl"), {"path": str(folder), "split": "test"}]
    assert texts(dataset.prepare(config_of(train), tokenizer).batches.encoded, tokenizer) == ["a", "b", "c", "e"]


def test_sources_by_weight(folder, tokenizer):
    train = [{"path": str(folder / "train.jsonl"), "weight": 1}, {"path": str(folder / "more.jsonl"), "weight": 3}]
    batches = dataset.prepare(config_of(train), tokenizer).batches
    f = tokenizer("f")["input_ids"][-1]
    shown = [(batches.at(step)["tokens"] == f).any() for step in range(4)]
    assert sum(shown) == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"path": "a", "weight": 1}, "b"], "some sources have a weight and some have none"),
        ([{"path": "a", "weight": 0}], r"{'path': 'a', 'weight': 0}: expected {\"path\"}, with \"weight\" \(above 0\)"),
        ([{"path": "a", "wieght": 1}], r"expected {\"path\"}, with"),
        ([{"weight": 1}], r"expected {\"path\"}, with"),
        ([3], r"config.data.train=\[3\]: expected text or a list of"),
        ("", "config.data.train is not set"),
    ],
)
def test_bad_sources(train, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        dataset.prepare(config_of(train), tokenizer)


def test_a_weighted_source_of_nothing(folder, tokenizer):
    (folder / "bad.jsonl").write_text('{"question": "x"}\n')
    train = [{"path": str(folder / "train.jsonl"), "weight": 1}, {"path": str(folder / "bad.jsonl"), "weight": 1}]
    with pytest.raises(ValueError, match="nothing can be learned from '.*bad.jsonl', which has a weight"):
        dataset.prepare(config_of(train), tokenizer)


def test_sources_on_the_command_line_and_in_a_record():
    config = apply_overrides(Config(), ['--config.data.train=[{"path": "a", "weight": 2}, "b"]'])
    assert config.data.train == ({"path": "a", "weight": 2}, {"path": "b"})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert apply_overrides(Config(), ["--config.data.train=rows.jsonl"]).data.train == "rows.jsonl"


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("25", 25), ("0.05", 0.05), ("none", None)])
def test_bad_rows_are_a_number_or_a_share(text, value):
    config = apply_overrides(Config(), [f"--config.data.max_bad_rows={text}"])
    assert config.data.max_bad_rows == value
    assert type(config.data.max_bad_rows) is type(value)


def test_half_a_row_is_no_number():
    with pytest.raises(ValueError, match="of at least 0, or a share below 1"):
        apply_overrides(Config(), ["--config.data.max_bad_rows=2.5"])
