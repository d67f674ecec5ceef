"""The main paths where torch is not installed; `make test` runs this file in an environment of its own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.cli.evaluate import main as evaluate
from qlora_jax.cli.export import main as export
from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.train import main as train
from tests.cli.tiny import make_model, write_config, write_rows

PROMPT = ["--prompt", "say 3:", "--max-new-tokens", "4", "--dtype", "fp32", "--json"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a model, rows and a configuration."""
    folder = tmp_path_factory.mktemp("work")
    model, rows = make_model(folder / "model"), write_rows(folder / "rows.jsonl")
    write_config(folder / "config.py", model, rows)
    return folder


@pytest.fixture(scope="module")
def run(work) -> Path:
    """A run of three steps, the last of which it took in a second start."""
    start = ["--config", str(work / "config.py"), f"--config.output_dir={work / 'run'}"]
    start += [f"--config.data.eval={write_rows(work / 'eval.jsonl', count=3)}"]
    assert train([*start, "--config.train.steps=2"]) == 0
    assert train([*start, "--config.train.steps=3"]) == 0
    return work / "run"


@pytest.fixture(scope="module")
def merged(run, work) -> Path:
    assert export(["--run", str(run), "--out", str(work / "merged"), "--format", "merged"]) == 0
    return work / "merged"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("package", ["torch", "peft", "bitsandbytes"])
def test_is_not_installed(package):
    assert importlib.util.find_spec(package) is None, "this file is for `make test-no-torch`"


def test_run_continues_and_finishes(run):
    rows = metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]
    assert {"adapter", "checkpoints", "config.json", "report.html"} <= {file.name for file in run.iterdir()}


def test_evaluate_finds_the_loss_that_training_wrote_last(run, work, capsys):
    adapter = ["--adapter", str(run / "adapter"), "--quant", "nf4", "--dtype", "fp32"]
    assert evaluate(["--model", str(work / "model"), *adapter, "--data", str(work / "eval.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 3 * (len(" 0 yes") + 1)  # with its eos
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))
    assert result["loss"] == pytest.approx(metrics(run)[-1]["eval_loss"], rel=1e-5)


def test_peft_export_holds_every_projection(run, work):
    assert export(["--run", str(run), "--out", str(work / "peft"), "--format", "peft"]) == 0
    tensors = load_file(work / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert all(np.isfinite(value).all() for value in tensors.values())


def test_serves_base_and_adapter(run, work):
    """By the script of `make serve-demo`, which asks every model the same and ends."""
    shutil.copytree(run / "adapter", work / "adapters" / "tuned")
    command = [sys.executable, "scripts/serve_demo.py", "--model", work / "model", "--adapters", work / "adapters"]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command += ["--once", "--port", "0", "--prompt", "say 3:"]
    served = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert served.returncode == 0, served.stderr
    lines = [line.split(maxsplit=1) for line in served.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == ["model", "tuned"]
    assert "say 3:" in served.stdout


def test_generates_from_the_merged_model_as_from_base_and_adapter(run, work, merged, capsys):
    base = ["--model", str(work / "model"), "--adapter", str(run / "adapter"), "--quant", "none"]
    assert generate([*base, *PROMPT]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert generate(["--model", str(merged), *PROMPT]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert len(expected["tokens"]) == 4
