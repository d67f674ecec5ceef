"""Adapters on their way from disk to the device: checked, told apart by content, dropped when unused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.safetensors import TensorFolder
from qlora_jax.serve.adapters import AdapterStore
from qlora_jax.serve.adapters.reading import content_hash, read_checked
from qlora_jax.serve.request import Refused, Request, UnknownModel
from tests.serve.parts import Heard, alone, answer, ask, make_engine, prompt, write_random_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def own(base, adapters, tmp_path):
    """A folder of adapters that a test may change."""
    folder = tmp_path / "adapters"
    for name in ("q1", "all3", "all5"):
        shutil.copytree(adapters / name, folder / name)
    return folder


@pytest.fixture
def engine(base, own):
    engine = make_engine(base, own)
    engine.start()
    yield engine
    engine.close()


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder, function):
    save_file({name: function(name, value) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def rename(folder, old, new):
    tensors = {name.replace(old, new): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


FAULTS = {
    "NaN": (lambda f: change_tensors(f, lambda name, x: x * np.nan), "holds NaN or infinite values"),
    "another base": (lambda f: change(f / "qlora_jax.json", base_hash="0" * 32), "adapter for another base"),
    "other storage": (
        lambda f: change(f / "qlora_jax.json", lm_head="int8"),
        "a base with quant.lm_head='int8'",
    ),
    "single scales": (lambda f: change(f / "qlora_jax.json", double=False), "a base with quant.double=False"),
    "wrong shape": (lambda f: change_tensors(f, lambda n, x: x[..., :5] if "_A" in n else x), "this model needs"),
    "wrong dtype": (lambda f: change_tensors(f, lambda name, x: x.astype(np.int32)), "expected a float32"),
    "DoRA": (lambda f: change(f / "adapter_config.json", use_dora=True), "use_dora=True is not supported"),
    "no method": (lambda f: change(f / "adapter_config.json", peft_type="IA3"), "only 'LORA'"),
    "a rank that lies": (lambda f: change(f / "adapter_config.json", r=7), "gives it rank 7"),
    "a rank of a word": (lambda f: change(f / "adapter_config.json", r="x"), "adapter 'q1'"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter 'q1'"),
    "another list": (lambda f: (f / "qlora_jax.json").write_text("[]"), "adapter 'q1'"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]), "is truncated"),
    "too large": (lambda f: (f / WEIGHTS).write_bytes(bytes(10**6 + 1)), "has 1,000,001 bytes, at most 1,000,000"),
    "large settings": (lambda f: (f / "adapter_config.json").write_bytes(b" " * 2**21), "at most 1,048,576"),
    "unknown module": (lambda f: rename(f, "q_proj", "z_proj"), "does not cover"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_served_is_refused(own, limits, fault):
    spoil, words = FAULTS[fault]
    spoil(own / "q1")
    with pytest.raises(Refused, match=words) as error:
        read_checked("q1", own / "q1", limits)
    assert str(own) not in str(error.value)


def test_a_rank_above_the_largest_is_refused(base, tmp_path, limits):
    write_random_adapter(tmp_path / "large", base, 1, rank=13, targets=("q_proj",))
    with pytest.raises(Refused, match="adapter 'large': its rank is 13, at most 12 is served"):
        read_checked("large", tmp_path / "large", limits)


def test_the_output_layer_is_served_as_it_is(base, tmp_path, limits):
    write_random_adapter(tmp_path / "head", base, 1, rank=2, targets=("q_proj", "lm_head"))
    with pytest.raises(Refused, match="it changes lm_head, which is served as it is: merge the adapter"):
        read_checked("head", tmp_path / "head", limits)


def test_weights_that_overflow_the_served_format_are_refused(own, limits):
    change_tensors(own / "q1", lambda name, x: np.full_like(x, 1e30))
    read_checked("q1", own / "q1", limits)
    with pytest.raises(Refused, match="not finite in float16"):
        read_checked("q1", own / "q1", dataclasses.replace(limits, dtype="float16"))


def test_other_dtypes_and_pefts_own_folders_are_served(own, limits):
    change_tensors(own / "q1", lambda name, x: x.astype(ml_dtypes.bfloat16))
    (own / "q1" / "qlora_jax.json").unlink()
    assert read_checked("q1", own / "q1", limits).rank == 1


def test_whole_layers_that_are_the_bases_own_are_served(own, base, limits):
    tensors, file = TensorFolder(base), own / "q1" / WEIGHTS
    whole = {"base_model.model.lm_head.weight": tensors.read("lm_head.weight")}
    plain = load_file(file)
    save_file(plain | whole, file)
    assert read_checked("q1", own / "q1", dataclasses.replace(limits, base=tensors)).rank == 1
    with pytest.raises(Refused, match="is a whole layer, which is not supported here"):
        read_checked("q1", own / "q1", limits)
    save_file(plain | {name: value * 2 for name, value in whole.items()}, file)
    with pytest.raises(Refused, match="is another lm_head than the base's"):
        read_checked("q1", own / "q1", dataclasses.replace(limits, base=tensors))


def test_an_adapter_of_a_base_in_16_bits_is_served_on_any(base, tmp_path, limits):
    record = {"method": "lora", "double": False}
    write_random_adapter(tmp_path / "lora", base, 1, rank=2, targets=("q_proj",), record=record)
    assert read_checked("lora", tmp_path / "lora", limits).rank == 2


def test_a_faulty_adapter_fails_its_own_requests_only(engine, own, alone_answers):
    FAULTS["NaN"][0](own / "all3")
    bad, good = ask(engine, prompt(1), "all3"), ask(engine, prompt(1), "q1")
    assert bad.finished().reason == "failed"
    assert "adapter 'all3'" in bad.end.error and "NaN" in bad.end.error
    assert good.finished().reason == "length"
    assert good.ids == alone_answers("q1", prompt(1))
    with pytest.raises(Refused, match="NaN"):
        engine.load_adapter("all3")


def test_a_changed_file_under_the_same_name_is_a_new_adapter(engine, base, own, alone_answers):
    """A request that runs keeps the one that it began with, and no keys or values are carried over."""
    old = content_hash(own / "all3")
    running = ask(engine, prompt(1), "all3", new=50)
    running.wait(lambda heard: heard.ids)
    write_random_adapter(own / "all3", base, 77, rank=9, targets="all-linear")
    fresh = ask(engine, prompt(1), "all3", new=20)
    assert fresh.finished().cached == 0
    assert fresh.ids == alone(base, own / "all3").generate([prompt(1)], max_new_tokens=20)[0]
    assert running.finished().reason == "length"
    assert running.ids == alone_answers("all3", prompt(1), 50)
    hashes = {adapter.hash for adapter in engine.view().adapters if adapter.name == "all3"}
    assert hashes == {old, content_hash(own / "all3")}


def test_unloading_lets_running_requests_end_and_takes_no_new_ones(engine, alone_answers):
    running, waiting = ask(engine, prompt(1), "all5", new=50), ask(engine, prompt(2), "all5", new=5)
    running.wait(lambda heard: heard.ids)
    engine.unload_adapter("all5")
    with pytest.raises(UnknownModel, match="no adapter 'all5' is served: these are: base, all3, q1"):
        ask(engine, prompt(1), "all5")
    with pytest.raises(UnknownModel):
        engine.unload_adapter("all5")
    assert [running.finished().reason, waiting.finished().reason] == ["length", "length"]
    assert running.ids == alone_answers("all5", prompt(1), 50)
    assert engine.models() == [("base", None), ("all3", "base"), ("q1", "base")]
    engine.load_adapter("all5")
    assert answer(engine, prompt(1), "all5") == alone_answers("all5", prompt(1))


def test_an_adapter_can_be_loaded_under_another_name(engine, alone_answers):
    engine.load_adapter("other", "all3")
    assert answer(engine, prompt(1), "other") == alone_answers("all3", prompt(1))
    assert ("other", "base") in engine.models()
    for name, folder, error, words in (
        ("q1", "all3", ValueError, "'q1' is the name of another adapter"),
        ("../x", "all3", ValueError, "'../x' is no adapter's name"),
        ("new", "../adapters/q1", UnknownModel, "offers no '../adapters/q1'"),
        ("nobody", None, UnknownModel, "offers no 'nobody'"),
    ):
        with pytest.raises(error, match=words):
            engine.load_adapter(name, folder)
    engine.unload_adapter("other")
    with pytest.raises(UnknownModel):
        ask(engine, prompt(1), "other")
    assert answer(engine, prompt(1), "all3") == alone_answers("all3", prompt(1))


def test_an_adapter_that_comes_later_is_served(engine, base, own, alone_answers, adapters):
    shutil.copytree(adapters / "o8", own / "o8")
    assert answer(engine, prompt(1), "o8") == alone_answers("o8", prompt(1))


def test_host_memory_keeps_the_last_used_and_what_is_waited_for(own, limits):
    store, came = AdapterStore(own, limits, host=2), Heard()
    store.changed = lambda: came("changed")
    wants = {name: store.want(name) for name in ("q1", "all3", "all5")}
    assert [store.get(want) for want in wants.values()] == [None] * 3
    came.wait(lambda heard: len(heard.events) == 2)
    assert [name for name, _ in store.held()] == ["q1", "all3"]  # the third waits for room
    assert store.get(wants["q1"]).rank == 1
    store.release(wants["all3"])
    came.wait(lambda heard: len(heard.events) == 3)
    assert [name for name, _ in store.held()] == ["q1", "all5"]
    assert store.get(wants["all5"]).rank == 5
    store.close()


def test_files_that_change_before_they_are_read_and_then_change_back(own, limits, monkeypatch):
    """A request that came before the change gets what is read; one that comes after it, what is there then."""
    for name, other in (("q1", "old"), ("all5", "new")):
        (own / name).rename(own / other)
    link(own, "old")
    store, came = AdapterStore(own, limits, host=4), Heard()
    monkeypatch.setattr(store, "changed", lambda: came("changed"))
    first = store.want("served")
    link(own, "new")
    assert store.get(first) is None
    came.wait(lambda heard: heard.events)
    assert store.get(first).rank == 5
    link(own, "old")
    second = store.want("served")
    assert store.get(second) is None
    came.wait(lambda heard: len(heard.events) == 2)
    assert (store.get(first).rank, store.get(second).rank) == (5, 1)
    store.close()


def link(folder, target):
    (folder / ".link").symlink_to(folder / target)
    (folder / ".link").replace(folder / "served")


def test_the_tiers_are_shown(engine):
    assert {(a.name, a.where) for a in engine.view().adapters} == {("q1", "disk"), ("all3", "disk"), ("all5", "disk")}
    engine.load_adapter("all5")
    answer(engine, prompt(1), "all3")
    shown = {a.name: (a.where, a.rank, bool(a.hash), a.users) for a in engine.view().adapters}
    assert shown == {
        "q1": ("disk", 0, False, 0),
        "all3": ("device", 3, True, 0),
        "all5": ("host", 5, True, 0),
    }


def test_a_base_without_adapters_is_served(base, alone_answers):
    engine = make_engine(base, None)
    engine.start()
    assert engine.models() == [("base", None)]
    assert answer(engine, prompt(1)) == alone_answers(None, prompt(1))
    heard = Heard()
    with pytest.raises(UnknownModel, match="no adapter 'q1' is served: these are: base"):
        engine.submit(Request(prompt=(1,), max_new_tokens=1, adapter="q1"), heard)
    engine.close()


def test_the_chat_template_is_that_of_the_folder(own, limits):
    store = AdapterStore(own, limits, host=2)
    (own / "q1" / "chat_template.jinja").write_text("mine")
    assert (store.chat_template("q1"), store.chat_template("all3"), store.chat_template("none")) == ("mine", None, None)
    (own / "secret").write_text("secret")
    (own / "all3" / "chat_template.jinja").symlink_to(own / "secret")
    with pytest.raises(ValueError, match="leads out"):
        store.chat_template("all3")
    store.unload("q1")
    assert store.chat_template("q1") is None
    store.close()
