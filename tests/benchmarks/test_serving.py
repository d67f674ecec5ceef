"""benchmarks/serving.py runs as a whole where there is no GPU."""

import json

from benchmarks import serving


def test_a_smoke_run_measures_everything(tmp_path):
    assert serving.main(["--smoke", "--out", str(tmp_path / "serving.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "serving.json").read_text())["rows"]}
    assert list(rows) == [
        "bare base, batch 1",
        "bare base, batch 16",
        "one adapter, batch 16",
        "8 adapters, batch 16",
        "first token, bare base",
        "first token, one adapter",
        "adapter from disk into host memory",
        "adapter from host memory into a slot",
        "programs compiled in warm-up",
        "step of a model of no size, batch 16",
        "share of the cores that other processes used meanwhile",
    ]
    assert all(row["smoke"] and row["bar"] is None for row in rows.values())
    assert all(row["value"] > 0 for name, row in rows.items() if "share" not in name)
    assert rows["8 adapters, batch 16"]["ratio"] > 0


def test_the_page_shows_the_stored_figures():
    rows = json.loads((serving.RESULTS / "serving-cpu.json").read_text())["rows"]
    assert serving.table(rows) in serving.PAGE.read_text()


def test_the_sizes_of_a_gpu_are_those_of_llama_2_7b():
    sizes = serving.sizes_for("gpu", smoke=False)
    assert (sizes.config.hidden_size, sizes.config.num_layers, sizes.dtype, sizes.rank) == (4096, 32, "bfloat16", 16)
