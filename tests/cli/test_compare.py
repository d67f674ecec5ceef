"""`scripts/compare.py` on a tiny model, and what it refuses."""

import json
import signal
from pathlib import Path

import pytest

from qlora_jax.cli.compare import main as compare
from qlora_jax.report.methods import TITLES
from qlora_jax.run import compare as comparing
from qlora_jax.run.train_result import TrainResult
from tests.cli.commands import exit_code
from tests.cli.tiny import write_rows
from tests.compare.study import write_run
from tests.compare.test_results import MEMORY


def arguments(sound, out, *more: str) -> list[str]:
    rows = [f"--config.data.{name}={sound / f'{name}.jsonl'}" for name in ("eval", "test")]
    return ["--config", str(sound / "config.py"), "--out", str(out), *rows, *more]


@pytest.fixture(scope="module")
def rows(sound):
    write_rows(sound / "eval.jsonl", 4)
    write_rows(sound / "test.jsonl", 6)
    return sound


@pytest.fixture
def no_planning(monkeypatch):
    """The memory of a 7B model is known; tests/compare/test_memory.py plans it."""
    asked = []

    def plan(gpu):
        asked.append(gpu)
        return MEMORY

    monkeypatch.setattr(comparing, "memory_in_a_process", plan)
    return asked


def test_a_comparison_from_beginning_to_end(rows, tmp_path, capsys, monkeypatch, no_planning):
    out, trained = tmp_path / "out", []
    real = comparing.train

    def train(config, *, progress):
        """Short runs are made up, to save time; the second whole one is stopped by SIGTERM."""
        trained.append(config.output_dir)
        if "/search/" in config.output_dir:
            write_run(Path(config.output_dir), config, loss=1.0)
            return TrainResult(folder=Path(config.output_dir))
        whole = [folder for folder in trained if "/runs/" in folder]
        if len(whole) == 2:
            return TrainResult(folder=Path(config.output_dir), stopped=signal.SIGTERM)
        return real(config, progress=progress)

    monkeypatch.setattr(comparing, "train", train)
    quick = arguments(rows, out, "--quick", "--config.data.exact_match=true", "--config.train.steps=4")
    assert exit_code(compare, quick) == 143
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (out / "compare.json").exists()

    assert exit_code(compare, quick) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("full fine-tune", "QLoRA", "27.00 GB", "held-out"))
    assert (trained.count(f"{out}/runs/qlora-seed0"), trained.count(f"{out}/runs/lora-seed0")) == (1, 2)
    result = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in result["rows"]] == list(TITLES)
    base, full, *_ = result["rows"]
    assert full["trainable"] == full["parameters"] == base["parameters"]
    assert all(row["heldout_loss"] > 0 and row["peak_bytes"] > 0 for row in result["rows"][1:])
    assert "Gain kept" in (out / "report.html").read_text()
    assert no_planning == [None]  # in a hurry nothing is compiled

    done = len(trained)
    assert exit_code(compare, quick) == 0
    assert len(trained) == done and no_planning == [None]
    assert json.loads((out / "compare.json").read_text())["rows"] == result["rows"]


def test_bad_input(rows, tmp_path, fails):
    out = tmp_path / "out"
    fails(compare, arguments(rows, out, "--quick", "--ablations"), "--ablations", "not allowed with", "--quick", code=2)
    fails(compare, ["--config", rows / "config.py"], "required: --out", code=2)
    fails(compare, ["--config", rows / "config.py", "--out", out], "config.data.eval=0.25", "choose learning rates on")
    missing = arguments(rows, out, f"--config.data.test={rows / 'none.jsonl'}")
    fails(compare, missing, "none.jsonl")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    fails(compare, arguments(rows, other), "other is not empty and holds no comparison", "choose another folder")
