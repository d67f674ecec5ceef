"""benchmarks/gpu_suite.py runs as a whole where there is no GPU, keeps what it measured and times nothing wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import api, exact, kernels, train
from benchmarks.gpu.compare import comparisons
from benchmarks.gpu.context import Context, Refused
from benchmarks.gpu.jobs import JOBS
from benchmarks.gpu.results import FIELDS, Results, make_row
from benchmarks.gpu.sizes import FULL, SMOKE

ROOT = Path(__file__).parents[2]
ABOUT = {"machine": {"card": "cpu"}, "versions": {"jax": "1"}}


def open_results(path, *, card="cpu", jax="1", smoke=True):
    return Results(path, {"card": card}, {"jax": jax}, smoke=smoke)


def options(path, **more):
    return Namespace(out=path, smoke=True, seconds=60, about=json.dumps(ABOUT), **more)


def context(tmp_path, job):
    return Context(open_results(tmp_path / "r.json"), job, SMOKE, time.monotonic() + 60)


def test_a_smoke_run_measures_every_part(tmp_path):
    """The peers' code too, with the real torch, peft and bitsandbytes."""
    out = tmp_path / "smoke.json"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--smoke", "--out", str(out)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    check_schema(report)
    rows = {row["name"]: row for row in report["rows"]}
    assert {row["job"] for row in report["rows"]} == {*JOBS, "compare"}
    for item in comparisons(SMOKE):  # a name that no job writes would never be compared
        assert {item.name, item.ours} | set(item.theirs) <= set(rows)
    check_measured(rows)


def check_schema(report):
    assert report["machine"]["card"] == "cpu" and report["versions"]["jax"]
    assert len({row["name"] for row in report["rows"]}) == len(report["rows"])
    for row in report["rows"]:
        assert set(FIELDS) <= set(row) <= {*FIELDS, "note", "smoke"} and row["smoke"] is True
        assert isinstance(row["value"], int | float) or (row["value"] is None and row["note"]), row
        assert (row["passed"] is None) or row["bar"]


def check_measured(rows):
    """These need no GPU, so they must have a figure; the others say why they have none."""
    for name in (
        "exact: dequantize, xla",
        "copy bandwidth",
        "matmul peak, bfloat16",
        "dequantize 64x64, auto",
        "dequantize + product 64x64, M=1",
        "train step, qlora, rank 16 all-linear",
        "train step, lora, rank 16 all-linear",
        "train step, qlora, rank 8 q,v",
        "load and quantize a checkpoint",
        "train step, 65B",
        "bitsandbytes dequantize_4bit 64x64",
        "bitsandbytes gemv_4bit 64x64",
        "train step, transformers + PEFT + bitsandbytes (bfloat16, sdpa)",
        "train step, transformers + PEFT + bitsandbytes (recipe, sdpa)",
    ):
        assert rows[name]["value"], rows[name]
    assert not [row for row in rows.values() if row.get("note", "").startswith("failed")]
    assert rows["train step against the best peer"]["ratio"] > 0
    assert "unsloth" in rows["train step, Unsloth"]["note"]


def test_it_needs_no_more_than_the_model_does():
    """The packages that only the data pipeline and the run folder need may be absent, and the package not installed."""
    code = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'tensorboardX', 'orbax.checkpoint'))); "
    code += "import benchmarks.gpu_suite; from benchmarks.gpu import " + ", ".join(
        file.stem
        for file in sorted((ROOT / "benchmarks/gpu").glob("*.py"))
        if file.stem not in ("__init__", "peer_model")
    )
    code += "; assert 'torch' not in sys.modules and 'bitsandbytes' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_wrong_kernel_is_refused(tmp_path, monkeypatch):
    right = api.dequantize
    monkeypatch.setattr(api, "IMPLEMENTATIONS", ("auto", "xla"))
    monkeypatch.setattr(api, "dequantize", lambda weight, dtype=None: right(weight, dtype).at[..., 0].add(1))
    asked = context(tmp_path, "exact")
    exact.run(asked)
    row = asked.results.row("exact: dequantize, auto")
    assert row["passed"] is False and "256x512 bfloat16 double differs in 256 of 131072" in row["note"]
    timed = context(tmp_path, "kernels.dequantize")
    kernels.run_dequantize(timed)
    rows = [row for row in timed.results.rows if row["name"].startswith("dequantize ")]
    assert len(rows) == 2 * (len(SMOKE.shapes) + 1)
    assert all(row["value"] is None and "is wrong on this device" in row["note"] for row in rows)
    with pytest.raises(Refused, match="dequantize \\(auto\\) is wrong"):
        train.require_exact(timed)


def test_a_wrong_product_is_refused(tmp_path, monkeypatch):
    right = api.matmul
    monkeypatch.setattr(api, "IMPLEMENTATIONS", ("auto",))
    monkeypatch.setattr(api, "matmul", lambda x, weight: right(x, weight).at[0, 7].add(1))
    asked = context(tmp_path, "exact")
    exact.run(asked)
    assert asked.results.row("exact: dequantize, auto")["passed"] is True
    assert asked.results.row("exact: matmul, auto")["passed"] is False
    with pytest.raises(Refused, match="matmul \\(auto\\) is wrong"):
        train.require_exact(asked)


def test_nothing_unchecked_is_timed(tmp_path):
    with pytest.raises(Refused, match="was not checked"):
        train.require_exact(context(tmp_path, "train.qlora"))


@pytest.mark.parametrize("y", [math.nan, 5.0])
def test_one_wrong_element_of_a_product_is_seen(y):
    import numpy as np

    x, weight = np.random.default_rng(0).standard_normal((2, 16, 64))
    product = x @ weight.T
    assert exact.error_of(product, x, weight) == 0
    product[3, 5] = y * 10
    assert not exact.error_of(product, x, weight) <= exact.TOLERANCE


def test_a_job_that_fails_leaves_the_others_rows(tmp_path, monkeypatch, capsys):
    def function_of(job):
        def run(context):
            context.row(f"{job}: first", 1.0, "s")
            if job == "train.lora":
                raise MemoryError(f"out of memory in {ROOT}/benchmarks")

        return run

    monkeypatch.setattr(gpu_suite, "function_of", function_of)
    path = tmp_path / "r.json"
    assert gpu_suite.worker(options(path, worker="train.qlora,train.lora,train.load")) == 1
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert [rows[f"train.{job}: first"]["value"] for job in ("qlora", "lora", "load")] == [1, 1, 1]
    assert rows["train.lora"]["value"] is None
    assert rows["train.lora"]["note"] == "failed: MemoryError: out of memory in ./benchmarks"


@pytest.mark.parametrize(
    "code, seconds, note",
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", 60, "ended with code -9"),
        ("import time; time.sleep(60)", 2 - gpu_suite.GRACE, "its part's time"),
    ],
)
def test_a_process_that_dies_leaves_the_others_rows(tmp_path, monkeypatch, code, seconds, note):
    path = tmp_path / "r.json"
    results = open_results(path)
    results.add(make_row("train.qlora", "speed", 5.0, "tokens/s"))
    results.add(make_row("train.lora", "half of it", 5.0, "tokens/s"))
    monkeypatch.setattr(gpu_suite, "command", lambda *_: [sys.executable, "-c", code])
    gpu_suite.run_jobs(options(path), ABOUT, ["train.lora", "train.load"], seconds)
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["speed"]["value"] == 5 and rows["half of it"]["value"] == 5
    for job in ("train.lora", "train.load"):
        assert rows[job]["value"] is None and note in rows[job]["note"]


def test_parts_join_one_file_and_a_job_replaces_its_own_rows(tmp_path):
    path = tmp_path / "r.json"
    results = open_results(path)
    results.add(make_row("train.qlora", "a", 1.0, "s"))
    results.add(make_row("train.qlora", "gone", 1.0, "s"))
    results.add(make_row("decode.nf4", "b", 2.0, "s"))
    again = open_results(path)
    again.begin("train.qlora")
    again.add(make_row("train.qlora", "a", 3.0, "s", reference=6.0, bar=(">=", 0.75)))
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["value"] for name, row in rows.items()} == {"a": 3, "b": 2}
    assert (rows["a"]["ratio"], rows["a"]["bar"], rows["a"]["passed"]) == (0.5, "ratio >= 0.75", False)


@pytest.mark.parametrize("other", [{"card": "NVIDIA H200"}, {"jax": "2"}, {"smoke": False}])
def test_what_does_not_belong_together_is_refused(tmp_path, other):
    open_results(tmp_path / "r.json").add(make_row("exact", "a", 1.0, "s"))
    with pytest.raises(ValueError, match="name another file with --out"):
        open_results(tmp_path / "r.json", **other)


@pytest.mark.parametrize(
    "more, ratio, passed",
    [
        ({"reference": 4.0, "bar": (">=", 0.5)}, 0.5, True),
        ({"reference": 4.0, "bar": (">=", 0.51)}, 0.5, False),
        ({"reference": 4.0, "inverse": True, "bar": (">=", 2)}, 2.0, True),
        ({"reference": 1.9, "bar": ("within", 0.05)}, 2 / 1.9, False),
        ({"reference": 1.95, "bar": ("within", 0.05)}, 2 / 1.95, True),
        ({"reference": 1.95, "bar": ("<=", 1)}, 2 / 1.95, False),
        ({"bar": (">=", 0.5)}, None, None),
    ],
)
def test_bars(more, ratio, passed):
    row = make_row("large.65b", "a", 2.0, "GB", **more)
    assert (row["part"], row["ratio"], row["passed"]) == ("large", ratio, passed)


def test_what_is_not_finite_is_no_measurement():
    row = make_row("exact", "a", math.nan, "s", reference=1.0, bar=(">=", 1))
    assert (row["value"], row["ratio"], row["passed"], row["note"]) == (None, None, None, "not finite: nan")


def test_the_bars_are_those_that_the_page_states():
    bars = {item.name: item.bar for item in comparisons(FULL) if item.bar}
    assert bars == {
        "dequantize 4096x4096 against bitsandbytes": (">=", 1.15),
        "dequantize 11008x4096 against bitsandbytes": (">=", 1.15),
        "dequantize 4096x11008 against bitsandbytes": (">=", 1.15),
        "dequantize 49408x4096 against bitsandbytes": (">=", 1.15),
        "train step against the best peer": (">=", 2.0),
        "train step against our bf16 LoRA": (">=", 0.95),
        "decode batch 1 against the peer": (">=", 10.0),
    }


@pytest.mark.parametrize(
    "found, rows", [({1: 2.0, 2: 1.5, 4: 0.9, 8: 1.1}, 2), ({1: 0.9}, 0), ({1: 1.0, 2: None, 4: 2.0}, 1)]
)
def test_where_the_kernels_cross(found, rows):
    assert kernels.crossing(found) == rows


def test_without_a_gpu_nothing_is_measured(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--out", str(tmp_path / "r.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "JAX sees no GPU here" in run.stderr
    assert not (tmp_path / "r.json").exists()
