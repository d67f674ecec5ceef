"""docs/deploy.md does what it says: its commands and its code are run, with a small run in the place of the demo's."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deploy.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PROMPT = "Question: type of (4, 2)\nAnswer:"


@pytest.fixture(scope="module")
def deployed(sound, tmp_path_factory):
    """A folder in which all commands but those that serve have run."""
    folder = tmp_path_factory.mktemp("deployed")
    for name in ("scripts", "qlora_jax"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(sound / "model", folder / "demo" / "base")
    shutil.copytree(sound / "run", folder / "runs" / "demo")
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "python" and words[1] != "scripts/serve.py":
            words = [sys.executable, *words[1:], "--merge-into", "dequantized"]
        if words[1] != "scripts/serve.py":
            subprocess.run(words, cwd=folder, env=environment(folder), check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def served(folder: Path, command: str) -> Iterator[str]:
    """The address of the command's server, on another port and in fp32."""
    words = [sys.executable, *shlex.split(command)[1:], "--port", "0", "--dtype", "fp32", "--max-length", "64"]
    with subprocess.Popen(words, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True) as process:
        try:
            found = (re.search(r"serving \S+ on (\S+)", line) for line in process.stderr)
            yield next(match[1] for match in found if match)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def answer(folder: Path, command: str, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with served(folder, command) as url:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def test_merged_and_apart_answer_alike(deployed):
    merged, apart = [command for command in COMMANDS if "scripts/serve.py" in command]
    text = answer(deployed, merged, "demo-merged")
    assert text == answer(deployed, apart, "demo")
    assert len(text) > 0


# peft still asks transformers by the older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_and_peft_load_the_folders(deployed, monkeypatch):
    monkeypatch.chdir(deployed)
    scopes = []
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        scopes.append({})
        exec(compile(code, "docs/deploy.md", "exec"), scopes[-1])
    assert PROMPT in scopes[0]["merged"] and PROMPT in scopes[1]["adapted"]
    assert len(scopes[0]["merged"]) > len(PROMPT) and len(scopes[1]["adapted"]) > len(PROMPT)
