"""What a command sets up before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def python(code: str, **environment: str) -> str:
    """What a fresh process prints that imports the train command and then runs `code`."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    inherited |= {"PYTHONPATH": str(ROOT), **environment}
    code = f"import os, qlora_jax.cli.train; from qlora_jax.cli.environment import prepare; {code}"
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited, check=True, capture_output=True, text=True
    ).stdout


def test_programs_are_cached_in_a_private_folder(tmp_path):
    code = "prepare(); import jax; jax.jit(lambda x: x * 3 + 1)(2.0)"
    python(code, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "qlora-jax" / "xla"
    assert any(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_users_own_settings_stay(tmp_path):
    code = "prepare(); import jax; jax.jit(lambda x: x * 3 + 1)(2.0); "
    code += "print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    assert python(code, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path), **settings) == "0.5\n"
    assert not (tmp_path / "qlora-jax").exists()


def test_settings_come_before_the_backend():
    """With a backend that does not exist, whatever starts one fails."""
    code = "prepare(); print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    assert python(code, JAX_PLATFORMS="nonexistent") == "false\n"


def test_every_line_of_the_log_is_there_once():
    """absl, which Orbax imports, gives the root logger a handler where it has none."""
    code = "import logging, qlora_jax.cli.environment as e; e.prepare(); import orbax.checkpoint; "
    code += "logging.getLogger('qlora_jax.kernels').info('ours'); logging.getLogger('other').warning('theirs')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stderr == "ours\ntheirs\n"
