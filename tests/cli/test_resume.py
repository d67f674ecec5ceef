"""A run that is killed or told to stop, and started again by the same command, ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.cli.train import main as train
from tests.cli.commands import command, exit_code

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
KEPT = [6, 8, 12]  # every fourth step, and every evaluated one; the last three
# Steps long enough to be watched from outside; dropout is on.
OVERRIDES = (
    f"train.steps={STEPS}",
    "train.save_every=4",
    "train.eval_every=6",
    "train.batch_size=8",
    "train.grad_accum=4",
    "train.seq_len=64",
    "train.keep_best=false",
)


@pytest.fixture(scope="module")
def uninterrupted(sound, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert exit_code(train, command(sound, folder, *OVERRIDES)) == 0
    return folder


def start(sound: Path, folder: Path) -> subprocess.Popen:
    """The same command in a process of its own."""
    arguments = [sys.executable, ROOT / "scripts" / "train.py", *command(sound, folder, *OVERRIDES)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def halt_when(process: subprocess.Popen, happens: Callable[[], bool]) -> None:
    """Stops the process (SIGSTOP) while the condition holds."""
    while True:
        assert process.poll() is None, process.stderr.read()
        if happens():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)  # until it stands still; meanwhile the condition may have passed
            if happens():
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def kill_when(process: subprocess.Popen, happens: Callable[[], bool]) -> None:
    halt_when(process, happens)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without their speed."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def last_step(folder: Path) -> int:
    return max((row["step"] for row in rows(folder) if "loss" in row), default=0)


def saved(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit())


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob("checkpoints/*orbax-checkpoint-tmp*"))


def assert_same(folder: Path, expected: Path) -> None:
    assert rows(folder) == rows(expected)
    assert saved(folder) == saved(expected) == KEPT
    got, want = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, expected))
    assert got.keys() == want.keys()
    different = [name for name in want if not np.array_equal(got[name], want[name])]
    assert different == []


def test_killed_run_ends_with_the_same_bits(sound, uninterrupted, tmp_path, capfd):
    run = tmp_path / "run"
    kill_when(start(sound, run), lambda: last_step(run) >= 1)
    assert saved(run) == []  # before the first checkpoint
    kill_when(start(sound, run), lambda: saving(run) and saved(run) == [4])
    assert saving(run)  # what it was writing lies about, and is not taken for a checkpoint
    kill_when(start(sound, run), lambda: last_step(run) == STEPS)
    capfd.readouterr()
    assert exit_code(train, command(sound, run, *OVERRIDES)) == 0
    assert "continuing from the checkpoint of step " in capfd.readouterr().err
    assert_same(run, uninterrupted)


def test_stopped_run_saves_its_last_step_and_goes_on(sound, uninterrupted, tmp_path):
    run = tmp_path / "run"
    for number, code, step in (
        (signal.SIGTERM, 143, 1),
        (signal.SIGHUP, 129, 3),
        (signal.SIGUSR1, 138, 5),
        (signal.SIGINT, 130, 7),
    ):
        process = start(sound, run)
        halt_when(process, lambda step=step: last_step(run) >= step)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, messages = process.communicate()
        assert process.returncode == code, messages
        assert saved(run)[-1] == last_step(run) < STEPS
        assert f"stopped by signal {number.value} after step {last_step(run)}" in messages
        assert "Traceback" not in messages
        assert len([line for line in messages.splitlines() if "NF4 runs on" in line]) == 1
    assert exit_code(train, command(sound, run, *OVERRIDES)) == 0
    assert rows(run) == rows(uninterrupted)


def test_a_second_process_is_refused_while_the_first_lives(sound, tmp_path, fails, capsys):
    """Even where it is killed and cannot tidy up."""
    run = tmp_path / "run"
    process = start(sound, run)
    halt_when(process, lambda: last_step(run) >= 1)
    words = (f"another process (id {process.pid}) is training in {run}", "--config.output_dir")
    fails(train, command(sound, run, *OVERRIDES), *words)
    process.kill()
    process.communicate()
    assert exit_code(train, command(sound, run, *OVERRIDES, "train.steps=3", "train.resume=0")) == 0
    assert last_step(run) == 3


def test_resume_names_the_checkpoint_to_go_on_from(sound, uninterrupted, tmp_path):
    """Later checkpoints and rows go: they belong to a run that took another way."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    assert exit_code(train, command(sound, run, *OVERRIDES, "train.resume=6", "train.steps=7")) == 0
    assert saved(run) == [6, 7]
    assert last_step(run) == 7
    assert rows(run)[:8] == rows(uninterrupted)[:8]  # steps 0 to 6, with two evaluations
    assert exit_code(train, command(sound, run, *OVERRIDES, "train.resume=6")) == 0
    assert_same(run, uninterrupted)
