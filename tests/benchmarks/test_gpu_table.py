"""The page's table shows measurements, and only those."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.results import Results, make_row
from benchmarks.gpu_table import NOTHING, table

ROOT = Path(__file__).parents[2]
CARD = {"card": "NVIDIA H200", "driver": "1.2", "cpu": "some processor", "cores": 16}


def write(folder, *, name="h200-2026-01-31.json", smoke=False):
    results = Results(folder / name, CARD, {"jax": "0.11"}, smoke=smoke)
    results.add(make_row("exact", "exact: dequantize, auto", 17, "cases", reference=17, bar=(">=", 1)))
    row = make_row("kernels.dequantize", "dequantize", 3210.987, "GB/s", reference=4300.0, bar=(">=", 0.75))
    results.add(row)
    results.add(make_row("decode.nf4", "decode", 0.012345, "tokens/s", reference=0.01, note="a | b"))
    note = "not measured: cannot be imported: no module 'unsloth'"
    results.add(make_row("peers.unsloth", "train step, Unsloth", None, "tokens/s", note=note))
    return folder / name


def test_every_row_is_shown_and_what_is_missing_says_so(tmp_path):
    write(tmp_path)
    (tmp_path / "compiled-memory.json").write_text("{}")
    lines = table(tmp_path).splitlines()
    assert lines[0] == "### NVIDIA H200, 2026-01-31"
    assert lines[2] == "Driver 1.2, some processor, 16 cores. jax 0.11."
    assert "| exact: dequantize, auto | 17 cases | 17 | 1 | ratio >= 1: met |  |" in lines
    assert "| dequantize | 3,211 GB/s | 4,300 | 0.7467 | ratio >= 0.75: **missed** |  |" in lines
    assert "| decode | 0.01235 tokens/s | 0.01 | 1.234 |  | a \\| b |" in lines
    unmeasured = (
        "| train step, Unsloth | not measured |  |  |  | not measured: cannot be imported: no module 'unsloth' |"
    )
    assert unmeasured in lines
    assert lines[lines.index("#### Train step and loading") + 2] == "Not measured."


def test_a_smoke_file_is_refused(tmp_path):
    write(tmp_path, smoke=True)
    page = tmp_path / "page.md"
    page.write_text("text\n<!-- gpu-table: begin -->\nold\n<!-- gpu-table: end -->\n")
    command = [sys.executable, str(ROOT / "benchmarks/gpu_table.py"), "--results", str(tmp_path), "--page", str(page)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "h200-2026-01-31.json was written by a smoke run" in run.stderr
    assert "old" in page.read_text()


def test_with_no_file_the_page_says_that_nothing_is_measured(tmp_path):
    assert table(tmp_path) == NOTHING
    assert "No GPU has been measured yet" in NOTHING and "python benchmarks/gpu_suite.py" in NOTHING


def test_the_page_is_what_the_files_give():
    run = subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu_table.py"), "--check"])
    assert run.returncode == 0, "docs/benchmarks.md is stale: python benchmarks/gpu_table.py"


def test_committed_results_are_no_smoke():
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        assert not any(row.get("smoke") for row in json.loads(file.read_text()).get("rows", [])), file.name
