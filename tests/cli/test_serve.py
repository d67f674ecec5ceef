"""serve.py: what it refuses, and that it starts, answers and ends."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from qlora_jax.cli.serve import main as serve
from qlora_jax.config import QuantSection
from qlora_jax.run.serve import base_name, key_of, public_host, recorded_quantization

ROOT = Path(__file__).resolve().parents[2]


def test_the_extra_is_named_where_it_is_missing(sound, fails, monkeypatch):
    find = importlib.util.find_spec
    missing = ("fastapi", "uvicorn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    fails(serve, ["--model", sound / "model"], "needs fastapi, uvicorn: pip install 'qlora-jax[serve]'")


def test_a_taken_port(sound, fails):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fails(serve, ["--model", sound / "model", "--port", port], f"port {port}: Address already in use", "--port")


@pytest.mark.parametrize(
    "argv, words, code",
    [
        (["--adapters", "nowhere"], ["--adapters 'nowhere' is no folder"], 1),
        (["--adapters", __file__], ["is no folder: give one whose subfolders are adapters"], 1),
        (["--model", "no/such/model"], ["no/such/model"], 1),
        (["--host", "no such host"], ["--host 'no such host' is no address"], 1),
        (["--api-key", "a", "--admin-key", "a"], ["--admin-key is the same as --api-key"], 1),
        (["--api-key", " a"], ["QLORA_JAX_API_KEY: a key must be printable ASCII"], 1),
        (["--api-key", ""], ["QLORA_JAX_API_KEY: a key must be printable ASCII"], 1),
        (
            ["--public-host", "https://llm.example.com"],
            ["--public-host 'https://llm.example.com'", "without https://"],
            1,
        ),
        (["--public-host", "a.example", "--public-host", "b/c"], ["--public-host 'b/c': expected a name"], 1),
        (["--slots", "0"], ["slots must be at least 1, got 0"], 1),
        (["--port", "65536"], ["'65536' is no port"], 2),
        (["--slots", "many"], ["--slots", "many"], 2),
    ],
)
def test_bad_arguments(sound, fails, argv, words, code):
    fails(serve, ["--model", sound / "model", "--port", "0", *argv], *words, code=code)


@pytest.mark.parametrize("name", ["llm.example.com", "localhost", "192.0.2.1:8443", "[2001:db8::1]:443", "a_b.example"])
def test_public_names(name):
    assert public_host(name.upper()) == name


def test_keys_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("QLORA_JAX_API_KEY", "sesame")
    assert key_of(None, "QLORA_JAX_API_KEY") == "sesame"
    assert key_of("other", "QLORA_JAX_API_KEY") == "other"
    monkeypatch.setenv("QLORA_JAX_API_KEY", "")
    assert key_of(None, "QLORA_JAX_API_KEY") is None


def test_the_base_is_called_by_its_folder_or_hub_name(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert [base_name(name) for name in (".", str(tmp_path / "my-model"), "org/name")] == [
        "my-model",
        "my-model",
        "org/name",
    ]


def test_the_base_is_stored_as_most_adapters_say(tmp_path, caplog):
    def record(name, **values):
        (tmp_path / name).mkdir()
        (tmp_path / name / "qlora_jax.json").write_text(json.dumps(values))

    assert recorded_quantization(None) is None
    record("lora", method="lora", double=True)
    assert recorded_quantization(tmp_path) is None
    record("a", method="qlora", double=True, lm_head="nf4", embedding="none", other=1)
    record("b", method="qlora", double=True, lm_head="nf4", embedding="none")
    assert recorded_quantization(tmp_path) == QuantSection(lm_head="nf4")
    record("c", method="qlora", double=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "qlora_jax.json").write_text("{")
    assert recorded_quantization(tmp_path) == QuantSection(lm_head="nf4")
    assert "1 of 3 adapters were trained on a base that is stored otherwise" in caplog.text


def test_starts_answers_and_ends(sound, tmp_path):
    """The command itself, with an adapter and keys from the environment; SIGTERM ends it with exit code 0."""
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "tuned").symlink_to(sound / "run" / "adapter")  # leads out of the folder: not served
    (adapters / "copied").mkdir()
    for file in (sound / "run" / "adapter").iterdir():
        (adapters / "copied" / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "scripts/serve.py", "--model", sound / "model", "--adapters", adapters, "--port", "0"]
    command += ["--quant", "nf4", "--dtype", "fp32", "--max-length", "32", "--slots", "2", "--max-loras", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QLORA_JAX_API_KEY": "sesame"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines: list[str] = []
            while not (found := re.search(r"serving model on (http://127\.0\.0\.1:\d+)", lines[-1] if lines else "")):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            with httpx.Client(base_url=found[1], headers={"Authorization": "Bearer sesame"}, timeout=60) as client:
                models = [model["id"] for model in client.get("/v1/models").json()["data"]]
                body = {"prompt": "say 3:", "max_tokens": 4, "temperature": 0}
                texts = [client.post("/v1/completions", json={**body, "model": name}).json() for name in models]
            assert httpx.get(f"{found[1]}/v1/models").status_code == 401
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert models == ["model", "copied"]
    assert all(len(answer["choices"][0]["text"]) > 0 for answer in texts)
