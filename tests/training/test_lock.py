"""A run folder's lock is the process's own, and ends with it."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from qlora_jax.config import Config
from qlora_jax.training.lock import LOCK, RunLock
from qlora_jax.training.run_folder import check_run_folder, enter_run_folder

HOLDS = """
import os, sys, time
from pathlib import Path
from qlora_jax.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_child_that_outlives_the_process_does_not_hold_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match=rf"another process \(id {process.pid}\) is training in "):
            RunLock(tmp_path).take()
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with RunLock(tmp_path) as lock:
            lock.take()
            lock.take()
            assert (tmp_path / LOCK).read_text() == str(os.getpid())
        assert (tmp_path / LOCK).read_text() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_run_that_began_meanwhile_is_not_overwritten(tmp_path):
    config = Config(output_dir=str(tmp_path / "run"))
    with RunLock(tmp_path / "run") as lock:
        enter_run_folder(lock, config, begun=False)
    assert check_run_folder(config) == tmp_path / "run"  # a lock alone is no run
    (tmp_path / "run" / "config.json").write_text("{}")
    with RunLock(tmp_path / "run") as lock, pytest.raises(ValueError, match="has begun a run in .* meanwhile"):
        enter_run_folder(lock, config, begun=False)
