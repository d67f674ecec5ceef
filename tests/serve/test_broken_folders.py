"""Whatever is wrong with an adapter's folder harms that adapter alone: it is listed with its reason."""

import json
import logging
import os
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import QuantSection
from qlora_jax.run.serve import recorded_quantization
from qlora_jax.serve.adapters import store as store_module
from qlora_jax.serve.request import Refused, UnknownModel
from tests.serve.parts import answer, ask, make_engine, prompt

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "qlora_jax.json"


def settings(**changes):
    def change(folder):
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replaced(old, new):
    return lambda folder: (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes().replace(old, new))


def tensors(function):
    return lambda folder: save_file({k: function(v) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def header(table, body=b""):
    content = json.dumps(table).encode()
    return text(WEIGHTS, struct.pack("<Q", len(content)) + content + body)


def pipe(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def place(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def circle(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)


def nested(depth):
    return b'{"peft_type":' * depth + b"1" + b"}" * depth


MANY = {
    f"base_model.model.m{i}.lora_A.weight": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
    for i in range(15_000)
}
F8 = {"x": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]}}
# By name of the folder: what was done to a good one, and words of the reason.
LISTED = {
    "config-list": (text(CONFIG, b"[]"), "holds a list"),
    "config-empty": (text(CONFIG, b""), "is no JSON"),
    "config-nan": (replaced(b'"lora_alpha": 16', b'"lora_alpha": NaN'), "NaN is no finite number"),
    "config-infinite": (replaced(b'"lora_alpha": 16', b'"lora_alpha": 1e999'), "no finite number"),
    "config-digits": (replaced(b'"lora_alpha": 16', b'"lora_alpha": ' + b"9" * 100_000), "4300 digits"),
    "config-deep": (text(CONFIG, nested(400)), "nested 400 deep"),
    "config-very-deep": (text(CONFIG, b"[" * 100_000), "100,000 lists"),
    "config-utf16": (lambda folder: text(CONFIG, (folder / CONFIG).read_text().encode("utf-16"))(folder), "not UTF-8"),
    "config-large": (text(CONFIG, b" " * (1 << 21)), "has 2,097,152 bytes"),
    "rank-text": (settings(r="1"), "r='1': expected a whole number from 1 to 65,536"),
    "rank-true": (settings(r=True), "r=True"),
    "rank-huge": (settings(r=10**30), "expected a whole number"),
    "rank-list": (settings(r=[1]), "r=[1]"),
    "rank-none": (settings(r=0), "r=0"),
    "alpha-text": (settings(lora_alpha="x"), "lora_alpha='x': expected a number"),
    "alpha-huge": (settings(lora_alpha=10**400), "lora_alpha="),
    "dropout": (settings(lora_dropout=5), "lora_dropout=5"),
    "targets-number": (settings(target_modules=5), "target_modules=5: expected a text or a list of texts"),
    "targets-mixed": (settings(target_modules=["q_proj", 3]), "target_modules="),
    "targets-nested": (settings(target_modules=[["q_proj"]]), "target_modules="),
    "targets-object": (settings(target_modules={"a": 1}), "target_modules="),
    "targets-no-regex": (settings(target_modules="*q_proj"), "nothing to repeat"),
    "targets-lookahead": (settings(target_modules="(?!x).*"), "cannot be matched in bounded time"),
    "targets-long": (settings(target_modules="a" * 100_000), "100,000 characters"),
    "ranks-list": (settings(rank_pattern=[1]), "rank_pattern=[1]"),
    "ranks-text": (settings(rank_pattern={"q": "a"}), "rank_pattern={'q': 'a'}"),
    "ranks-no-regex": (settings(rank_pattern={"(": 4}), "rank_pattern: "),
    "ranks-many": (settings(rank_pattern={f"x{i}": 4 for i in range(5000)}), "5,000 patterns"),
    "alphas-null": (settings(alpha_pattern={"q_proj": None}), "alpha_pattern="),
    "layers": (settings(layers_to_transform="x"), "layers_to_transform='x'"),
    "layers-pattern": (settings(layers_pattern={"a": 1}), "layers_pattern="),
    "method-list": (settings(peft_type=["LORA"]), "only 'LORA'"),
    "init-list": (settings(init_lora_weights=[]), "init_lora_weights=[]"),
    "base-list": (settings(base_model_name_or_path=[1]), "base_model_name_or_path=[1]"),
    "bias-long": (settings(bias=["x" * 100_000]), "bias="),
    "record-list": (text(RECORD, b"[]"), "holds a list"),
    "record-storage": (text(RECORD, b'{"method": "qlora", "lm_head": "int4"}'), "lm_head='int4': expected one of"),
    "record-unhashable": (text(RECORD, b'{"method": "qlora", "lm_head": ["a"]}'), "lm_head=['a']"),
    "record-object": (
        text(RECORD, b'{"method": "qlora", "double": {"a": 1}}'),
        "double={'a': 1}: expected true or false",
    ),
    "record-deep": (text(RECORD, b"[" * 100_000), "100,000 lists"),
    "record-hash": (text(RECORD, b'{"base_hash": 5}'), "base_hash=5: expected a text or null"),
    "record-method": (text(RECORD, b'{"method": [1]}'), "method=[1]"),
    "record-pipe": (pipe(RECORD), "qlora_jax.json is no file"),
    "record-folder": (place(RECORD), "qlora_jax.json is no file"),
    "weights-empty": (text(WEIGHTS, b""), "truncated"),
    "weights-half": (lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-8])(folder), "truncated"),
    "weights-int8": (tensors(lambda x: x.astype(np.int8)), "expected a float32"),
    "weights-flat": (tensors(lambda x: x.reshape(-1)), "expected a float32"),
    "weights-f8": (header(F8, bytes(16)), "F8_E4M3"),
    "weights-many": (header(MANY), "lists its tensors in 1,4"),
}
LEFT_OUT = {
    "pickled": (pickled, "is a pickle"),
    "config-absent": (lambda folder: (folder / CONFIG).unlink(), "holds no file adapter_config.json"),
    "config-pipe": (pipe(CONFIG), "holds no file adapter_config.json"),
    "config-circle": (circle, "cannot be read"),
    "weights-folder": (place(WEIGHTS), "holds no file adapter_model.safetensors"),
    "base": (lambda folder: None, "the base is called so"),
    "my adapter": (lambda folder: None, "adapters' names are ASCII"),
}
# What only the weights' values show, when they are asked for.
FOUND_LATER = {
    "weights-nan": (tensors(lambda x: x * np.nan), "NaN or infinite"),
    "weights-wide": (tensors(lambda x: x.repeat(2, 0)), "gives it rank"),
}
FINE = {
    "good": lambda folder: None,
    "bom": lambda folder: text(CONFIG, b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())(folder),
    "regex": settings(target_modules=r".*\.(?:q|k)_proj", exclude_modules=r".*k_proj"),
    "slow-key": settings(rank_pattern={r"((a|_|\w)+)+!": 4}, alpha_pattern={r"(\w+\.?)+!": 4}),
    "bf16": tensors(lambda x: x.astype(ml_dtypes.bfloat16)),
}


@pytest.fixture(scope="module")
def folder(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    spoils = {name: spoil for table in (LISTED, LEFT_OUT, FOUND_LATER) for name, (spoil, _) in table.items()} | FINE
    for name, spoil in spoils.items():
        shutil.copytree(adapters / "q1", folder / name)
        spoil(folder / name)
    (folder / "circle").symlink_to("circle")
    (folder / "itself").symlink_to(folder)
    (folder / "away").symlink_to(adapters / "q1")
    shutil.copytree(adapters / "q1", folder / "organization" / "name")
    (folder / "README.md").write_text("no adapter")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture(scope="module")
def engine(base, folder):
    engine = make_engine(base, folder, quantization=recorded_quantization(folder))
    engine.start()
    yield engine
    engine.close()


def test_the_records_that_can_be_read_decide_how_the_base_is_stored(folder):
    assert recorded_quantization(folder) == QuantSection()


@pytest.mark.parametrize("name", FINE)
def test_the_others_are_served(engine, alone_answers, name):
    assert answer(engine, prompt(1), name) == alone_answers("q1", prompt(1))


@pytest.mark.parametrize("name", [*LISTED, *LEFT_OUT])
def test_each_is_listed_with_its_reason(engine, name):
    (_, words) = (LISTED | LEFT_OUT)[name]
    reason = engine.view().broken[name]
    assert words in reason
    assert len(reason) < 700


def test_nothing_else_is_listed(engine):
    links = {"circle", "itself", "away", "organization"}
    assert engine.view().broken.keys() - FOUND_LATER.keys() == {*LISTED, *LEFT_OUT, *links}


def test_the_start_says_so(base, folder, caplog):
    with caplog.at_level(logging.WARNING, "qlora_jax.serve"):
        make_engine(base, folder).close()
    for name in ("rank-text", "pickled", "my adapter", "away", "organization"):
        assert sum(repr(name) in record.getMessage() for record in caplog.records) == 1, name


@pytest.mark.parametrize("name", [*LISTED, *FOUND_LATER])
def test_a_request_for_one_is_told_why_and_the_others_go_on(engine, folder, alone_answers, name):
    (_, words) = (LISTED | FOUND_LATER)[name]
    bad = ask(engine, prompt(2), name).finished()
    assert (bad.reason, bad.refused) == ("failed", True)
    assert words in bad.error and str(folder) not in bad.error
    with pytest.raises(Refused):
        engine.load_adapter(name)
    assert engine.view().state == "serving"


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_name_that_is_left_out_is_unknown_and_the_reason_is_told(engine, name):
    if name == "base":
        return  # it is the base that is asked then
    with pytest.raises(UnknownModel) as error:
        ask(engine, prompt(1), name)
    assert LEFT_OUT[name][1] in str(error.value)


def test_what_is_repaired_is_served_and_listed_no_more(engine, folder, adapters, alone_answers):
    assert "rank-text" in engine.view().broken
    shutil.copy(adapters / "q1" / CONFIG, folder / "rank-text" / CONFIG)
    assert "rank-text" not in engine.view().broken
    assert answer(engine, prompt(1), "rank-text") == alone_answers("q1", prompt(1))
    settings(r="1")(folder / "rank-text")
    assert ask(engine, prompt(1), "rank-text").finished().refused


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("a"), AssertionError()], ids=repr)
def test_the_thread_that_reads_outlives_whatever_happens(engine, folder, adapters, alone_answers, monkeypatch, error):
    read, newer = store_module.read_checked, shutil.copytree(adapters / "q1", folder / f"new-{id(error)}")

    def fails(name, *arguments):
        if name == newer.name:
            raise error
        return read(name, *arguments)

    monkeypatch.setattr(store_module, "read_checked", fails)
    assert ask(engine, prompt(1), newer.name).finished().refused
    monkeypatch.undo()
    assert answer(engine, prompt(1), newer.name) == alone_answers("q1", prompt(1))
    shutil.rmtree(newer)
