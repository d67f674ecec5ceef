"""A signal ends a run within one step whatever it is doing, and the same command ends it with the same bits."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.cli.train import main as train
from qlora_jax.run import train as training
from qlora_jax.run.samples import Answerer
from qlora_jax.training import loop, signals
from tests.cli.commands import command, exit_code
from tests.cli.test_resume import last_step, rows, saved

SETTINGS = ("data.exact_match=true", "train.save_every=10", "train.steps=4")  # evaluated after 0, 2 and 4 steps
# What it is doing: (where it is found, the name there, at which call, the last step whose state is to be saved).
DOING = {
    "encoding": (training, "prepare", 1, 0),
    "loading": (training, "make_trainer", 1, 0),
    "evaluating before": (loop, "evaluate", 1, 0),
    "sampling before": (Answerer, "samples", 1, 0),
    "compiling": (jax.stages.Lowered, "compile", 1, 0),
    "evaluating": (loop, "evaluate", 2, 2),
    "answering": (Answerer, "exact_match", 2, 2),
    "evaluating at the end": (loop, "evaluate", 3, 4),
    "sampling at the end": (Answerer, "samples", 2, 4),
}


@pytest.fixture(autouse=True)
def this_process_goes_on(monkeypatch):
    monkeypatch.setattr("qlora_jax.cli.errors.leave", lambda code: code)
    monkeypatch.setattr(signals, "_abandoned", False)


@pytest.fixture(scope="module")
def uninterrupted(sound, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert exit_code(train, command(sound, run, *SETTINGS)) == 0
    return run


@pytest.fixture
def hangs(monkeypatch):
    """`hangs(place, name, at, number)`: that call of the function does not come back; the signal comes meanwhile."""
    end = threading.Event()

    def patch(place, name: str, at: int, number: int) -> None:
        whole, calls = getattr(place, name), iter(range(1, 100))

        def hanging(*arguments, **options):
            if next(calls) == at:
                os.kill(os.getpid(), number)
                end.wait()
                raise SystemExit
            return whole(*arguments, **options)

        monkeypatch.setattr(place, name, hanging)

    yield patch
    end.set()


@pytest.mark.parametrize("doing", DOING)
def test_whatever_it_is_doing(sound, uninterrupted, hangs, tmp_path, capsys, doing):
    place, name, at, step = DOING[doing]
    number = (signal.SIGTERM, signal.SIGUSR1)[at % 2]
    run = tmp_path / "run"
    hangs(place, name, at, number)
    assert exit_code(train, command(sound, run, *SETTINGS)) == 128 + number
    message = f"stopped by signal {number.value} " + (f"after step {step};" if "sampling" not in doing and step else "")
    assert message in capsys.readouterr().err
    assert last_step(run) == max(saved(run), default=0) == step
    assert exit_code(train, command(sound, run, *SETTINGS)) == 0
    assert rows(run) == rows(uninterrupted)
    assert saved(run) == saved(uninterrupted)
    got, want = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, uninterrupted))
    assert all(np.array_equal(got[name], want[name]) for name in want) and got.keys() == want.keys()


def test_a_process_ends_although_a_library_computes(sound, tmp_path):
    code = (
        "import sys, time; from qlora_jax.cli import train; from qlora_jax.run import train as training; "
        "training.prepare = lambda *arguments: print('encoding', flush=True) or time.sleep(600); "
        "sys.exit(train.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, *command(sound, tmp_path / "run")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGHUP)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 129
    assert messages.splitlines()[-1].startswith("stopped by signal 1 ")
    assert not (tmp_path / "run").exists()
