"""Encoded rows on disk."""

import os

import numpy as np
import pytest

from qlora_jax.data import cache, encode
from qlora_jax.data.documents import Collector
from qlora_jax.data.encoding import Report, Settings, encode_all
from qlora_jax.data.formats import Text
from qlora_jax.data.row import Row

ROWS = [Row(values={"text": text}, origin=text) for text in ("hi there", "ok", "")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-jax" / "data"


def test_what_was_stored_is_loaded_and_not_copied(plain):
    documents, report = encode_all(ROWS, plain, Settings(seq_len=8))
    cache.store("key", documents, report)
    loaded, its_report = cache.load("key")
    assert its_report == report
    assert isinstance(loaded.ids, np.memmap)
    for one, other in zip(documents, loaded, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.scored, other.scored)
    assert cache.load("another") is None


def test_a_damaged_entry_counts_as_none(plain, folder):
    cache.store("key", *encode_all(ROWS, plain, Settings(seq_len=8)))
    for name in ("ids.npy", "report.json"):
        whole = (folder / "key" / name).read_bytes()
        (folder / "key" / name).write_bytes(whole[: len(whole) // 2])
        assert cache.load("key") is None
        (folder / "key" / name).write_bytes(whole)
    assert cache.load("key") is not None


def test_a_folder_that_cannot_be_written_is_no_error(plain, folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    cache.store("key", *encode_all(ROWS, plain, Settings(seq_len=8)))
    assert cache.load("key") is None


def test_the_oldest_entries_go(folder, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    killed = folder / f"{cache.UNFINISHED}old"
    killed.mkdir(parents=True)
    os.utime(killed, (0, 0))
    for key in "abc":
        cache.store(key, Collector().documents(), Report())
    assert len(list(folder.iterdir())) == 2
    assert cache.load("c") is not None


def test_the_key_is_all_that_the_documents_follow_from(plain, chatml, monkeypatch):
    key = cache.cache_key({"a": 1}, plain)
    assert cache.cache_key({"a": 1}, plain) == key
    assert cache.cache_key({"a": 2}, plain) != key
    assert cache.cache_key({"a": 1}, chatml) != key
    plain.chat_template = "{{ messages }}"
    assert cache.cache_key({"a": 1}, plain) != key
    plain.chat_template = None
    encode(Text(text="hi"), plain, seq_len=2)  # a call changes nothing
    assert cache.cache_key({"a": 1}, plain) == key
    monkeypatch.setattr(cache, "_code", lambda: ["other code"])
    assert cache.cache_key({"a": 1}, plain) != key
