"""Training as a function: it returns, says nothing unasked, and leaves nothing behind."""

import asyncio
import dataclasses
import logging
import os
import signal
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax import train
from qlora_jax.run import train as training
from qlora_jax.training.lock import LOCK
from qlora_jax.training.loop import Diverged
from qlora_jax.training.observer import LoggedSteps, Observer
from qlora_jax.training.signals import StopRequest


def weights(result):
    return load_file(result.adapter / "adapter_model.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def handlers():
    return [signal.getsignal(number) for number in StopRequest.SIGNALS]


@pytest.fixture
def nothing_is_left():
    """No handler, no thread that computes, and no lock is there after the test that was not before."""
    before, threads = handlers(), set(threading.enumerate())
    yield
    assert handlers() == before
    left = [thread for thread in threading.enumerate() if thread not in threads]
    assert [thread.name for thread in left if thread.is_alive()] == []


class Heard(Observer):
    """Keeps what it hears; `at_step` is called with every step."""

    def __init__(self, at_step=lambda step: None):
        self.notes, self.done, self.at_step = [], [], at_step

    def note(self, text):
        self.notes.append(text)

    def steps(self, total, *, start_step=0, log_every=1):
        return HeardSteps(self)


class HeardSteps(LoggedSteps):
    def update(self, step, *, loss, tokens_per_second):
        self._observer.done.append((step, loss))
        self._observer.at_step(step)


def test_it_gives_what_it_has_left(make_config, folder, trained):
    assert (trained.folder, trained.stopped, trained.steps) == (folder / "run", None, 3)
    assert (trained.adapter, trained.model) == (folder / "run" / "adapter", None)
    assert trained.summary["steps"] == 3 and trained.report.exists()
    assert [row["step"] for row in trained.rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in trained.rows if "eval_loss" in row] == [0, 2, 3]


def test_it_says_nothing_unless_asked(make_config, tmp_path, capfd, caplog, nothing_is_left):
    caplog.set_level(logging.INFO, "qlora_jax")
    train(make_config(tmp_path / "silent"))
    assert capfd.readouterr() == ("", "")
    assert any(message.endswith("report.html") for message in caplog.messages)
    train(make_config(tmp_path / "shown"), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "step 3/3 · loss " in err and "done: " in err
    heard = Heard()
    train(make_config(tmp_path / "heard"), progress=heard)
    assert capfd.readouterr() == ("", "")
    assert [step for step, _ in heard.done] == [1, 2, 3]
    assert heard.notes[0].startswith("qlora: ") and heard.notes[-1].endswith("report.html")


def test_in_a_thread(make_config, tmp_path, trained, nothing_is_left):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(make_config(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert same(weights(found[0]), weights(trained))


def test_where_an_event_loop_runs(make_config, tmp_path, trained, nothing_is_left):
    """As in a notebook."""

    async def cell():
        return train(make_config(tmp_path / "run"))

    assert same(weights(asyncio.run(cell())), weights(trained))


def test_a_signal_ends_it_and_the_same_call_goes_on(make_config, tmp_path, trained, nothing_is_left):
    config = make_config(tmp_path / "run")
    stopped = train(config, progress=Heard(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None))
    assert (stopped.stopped, stopped.steps, stopped.adapter, stopped.summary) == (signal.SIGINT, 2, None, None)
    whole = train(config)
    assert (whole.stopped, whole.steps) == (None, 3)
    assert same(weights(whole), weights(trained))


def test_a_signal_for_the_process_is_no_matter_of_a_thread(make_config, tmp_path, nothing_is_left):
    came, found = [], []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        heard = Heard(lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 2 else None)
        thread = threading.Thread(target=lambda: found.append(train(make_config(tmp_path / "run"), progress=heard)))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1] and (found[0].stopped, found[0].steps) == (None, 3)


def test_a_failed_call_leaves_nothing(make_config, tmp_path, nothing_is_left):
    config = make_config(tmp_path / "run")
    wrong = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e30, clip=0.0))
    with pytest.raises(Diverged, match="training has diverged"):
        train(wrong)

    def fails(step):
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        train(make_config(tmp_path / "other"), progress=Heard(fails))
    assert (tmp_path / "other" / LOCK).read_text() == ""
    assert train(make_config(tmp_path / "other")).steps == 3
    with pytest.raises(ValueError, match=r"config\.output_dir is not set"):
        train(dataclasses.replace(config, output_dir=""))


def test_another_thread_in_the_same_folder_is_refused(make_config, tmp_path, nothing_is_left):
    config, refused = make_config(tmp_path / "run"), []

    def second():
        try:
            train(config)
        except ValueError as error:
            refused.append(str(error))

    def at_step(step):
        if step == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    assert train(config, progress=Heard(at_step)).steps == 3
    [message] = refused
    assert "another thread of this process is training in" in message


def test_bits_that_the_process_was_not_started_for_are_said(make_config, tmp_path, monkeypatch, caplog):
    config = make_config(tmp_path, deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", "")
    training._warn_if_not_deterministic(config, Observer())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    training._warn_if_not_deterministic(make_config(tmp_path), Observer())
    assert caplog.text == ""
    training._warn_if_not_deterministic(config, Observer())
    assert "train.deterministic=True has no effect: set XLA_FLAGS=--xla_gpu_deterministic_ops=true" in caplog.text
