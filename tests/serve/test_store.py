"""The store of adapters: what it notices, what it remembers, and that its thread lives."""

import os
import shutil
import time

import numpy as np
import pytest

from qlora_jax.serve.adapters import AdapterStore, known
from qlora_jax.serve.adapters import store as store_module
from qlora_jax.serve.adapters.reading import read_checked
from tests.serve.parts import Heard

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(adapters, tmp_path):
    for name in ("q1", "all3", "all5"):
        shutil.copytree(adapters / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def store(folder, limits):
    store = AdapterStore(folder, limits, host=1)
    store.came = Heard()
    store.changed = lambda: store.came("changed")
    yield store
    store.close()


def read(store, name):
    """The adapter as a new request gets it."""
    want, before = store.want(name), len(store.came.events)
    found = store.get(want)
    if found is None:
        store.came.wait(lambda heard: len(heard.events) > before)
        found = store.get(want)
    store.release(want)
    return found


def write_over(file, factor):
    """Other values in the same file: its inode, size and time of writing stay."""
    times, content = file.stat(), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write((np.frombuffer(content[start:], np.float32) * np.float32(factor)).tobytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


def test_weights_that_are_written_over_in_place_are_noticed(store, folder):
    """However soon, and although the time of writing is set back."""
    keys = [read(store, "q1").key]
    for factor in (2, 0.5, 3):
        write_over(folder / "q1" / WEIGHTS, factor)
        keys.append(read(store, "q1").key)
    assert keys[0] == keys[2]  # the same content again is the same adapter
    assert len(set(keys)) == 3


def test_what_was_written_just_now_is_not_read_within_the_same_tick(store, folder, monkeypatch):
    """Written over once more before the file system's clock goes on, it would look the same."""
    ages = []

    def reading(name, place, limits):
        ages.append(time.time() - (place / WEIGHTS).stat().st_ctime)
        return read_checked(name, place, limits)

    monkeypatch.setattr(store_module, "read_checked", reading)
    for _ in range(3):
        write_over(folder / "q1" / WEIGHTS, 2)
        read(store, "q1")
    assert len(ages) >= 3 and min(ages) >= store_module.PAUSE


def test_a_touched_file_is_the_same_adapter(store, folder):
    before, loads = read(store, "q1"), store.loads
    os.utime(folder / "q1" / WEIGHTS)
    assert read(store, "q1").key == before.key
    assert store.loads == loads + 1


def test_old_versions_are_forgotten(store, folder):
    for i in range(20):
        write_over(folder / "q1" / WEIGHTS, 1 + i)
        read(store, "q1")
        read(store, "all3")
    assert len(store._known) == 2


def test_folders_that_come_and_go_are_forgotten(store, folder, monkeypatch):
    monkeypatch.setattr(known, "MOST", 4)
    waiting = store.want("all5")
    for i in range(10):
        shutil.copytree(folder / "q1", folder / f"n{i}")
        read(store, f"n{i}")
        shutil.rmtree(folder / f"n{i}")
    assert len(store._known) <= 4 + 1 and len(store._known.names) <= 4 + 2
    assert read(store, "all5").rank == 5
    store.release(waiting)


def test_a_listener_that_raises_does_not_end_the_thread(store):
    def raises():
        store.changed = lambda: store.came("changed")
        store.came("raised")
        raise KeyError("nobody listens")

    store.changed = raises
    assert read(store, "q1").rank == 1
    assert read(store, "all3").rank == 3


def test_an_adapter_on_the_device_needs_no_place_in_host_memory(store):
    """Else one that is always asked for would keep all others out."""
    busy = store.want("q1")
    key = read(store, "q1").key
    other = store.want("all3")
    assert store.get(other) is None
    assert [name for name, _ in store.held()] == ["q1"]
    before = len(store.came.events)
    store.on_device = lambda found: found == key
    store.release(store.want("q1"))  # whatever happens, the thread looks again
    store.came.wait(lambda heard: len(heard.events) > before)
    assert store.get(other).rank == 3
    assert store.get(busy) is None  # and is read again where it is needed


def test_a_failure_that_may_pass_is_tried_again(store, folder, monkeypatch):
    (folder / "q1" / WEIGHTS).rename(folder / "q1" / "away")
    want = store.want("all3")
    (folder / "all3" / WEIGHTS).rename(folder / "all3" / "away")
    assert store.get(want) is None
    store.came.wait(lambda heard: heard.events)
    with pytest.raises(Exception, match="all3"):
        store.get(want)
    store.release(want)
    (folder / "all3" / "away").rename(folder / "all3" / WEIGHTS)
    assert read(store, "all3").rank == 3
