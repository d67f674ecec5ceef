"""metrics.jsonl across restarts, and the progress lines."""

import io
import json
from pathlib import Path

import pytest

from qlora_jax.device.facts import memory_in_use
from qlora_jax.report.progress import Progress, duration
from qlora_jax.training.metrics import MetricsLog, read_rows


def write_steps(folder: Path, steps: range, **options) -> None:
    with MetricsLog(folder, **options) as log:
        for step in steps:
            log.write({"step": step, "loss": float(step)})


def test_rows_are_one_object_a_line_and_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "eval_loss": 2.5})
        log.write({"step": 1, "loss": 2.25, "tokens": 512})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "eval_loss": 2.5},
        {"step": 1, "loss": 2.25, "tokens": 512},
    ]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1}, {"step": 1, "loss": 1.0, "eval_loss": 1.0}])
def test_a_row_is_of_one_kind(tmp_path, row):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="either `loss` or `eval_loss`"):
        log.write(row)


def test_a_resumed_run_writes_the_lost_steps_again(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 7), restored_step=3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_last_line_is_dropped(tmp_path):
    write_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    write_steps(tmp_path, range(3, 4), restored_step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_new_run_starts_empty(tmp_path):
    write_steps(tmp_path, range(1, 3))
    write_steps(tmp_path, range(1, 2))
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_infinity_is_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "eval_loss": float("nan"), "perplexity": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "eval_loss": null, "perplexity": null}\n'


def test_progress_without_a_terminal_is_a_line_every_few_steps():
    stream = io.StringIO()
    with Progress(5, log_every=2, stream=stream) as progress:
        progress.note("compiling [the step]")
        for step in range(1, 6):
            progress.update(step, loss=1 / step, tokens_per_second=12345.6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling [the step]"
    assert [line.split(" · ")[0] for line in lines[1:]] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "loss 0.5000 · 12,346 tokens/s · " in lines[1] and lines[-1].endswith(" · 0:00 left")


def test_progress_on_a_narrow_terminal_shows_the_numbers(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(1875, start_step=1873, stream=stream) as progress:
        progress.update(1874, loss=0.5, tokens_per_second=23000)
        progress.update(1875, loss=0.25, tokens_per_second=23000)
    last = stream.getvalue().split("\r")[-1]
    assert "1875/1875" in last and "loss 0.2500 · 23,000 tokens/s" in last and "0:00 left" in last


def test_memory_is_labelled():
    assert memory_in_use().endswith((" GiB device", " GiB process"))


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (187, "3:07"), (7509, "2:05:09")])
def test_duration(seconds, text):
    assert duration(seconds) == text


DAMAGE = {
    "nothing but zeros, as after a power cut": b"\0" * 40,
    "no UTF-8": b'{"step": 2, "loss": "\xff"}',
    "cut in the middle": b'{"step": 2, "lo',
    "no object": b"[2, 3.0]",
    "no step": b'{"loss": 3.0}',
    "a step that is no number": b'{"step": "2", "loss": 3.0}',
    "an empty line": b"",
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_damaged_lines_are_named_and_left_out(tmp_path, caplog, damage, place):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines.insert(place, damage)
    old = b"".join(line + b"\n" for line in lines)
    path.write_bytes(old)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), restored_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == old
    assert caplog.messages == [
        f"{path}: damaged and left out: line {place + 1}; metrics.damaged.jsonl holds the file as it was"
    ]


def test_an_undamaged_file_is_not_copied(tmp_path, caplog):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(4, 5), restored_step=3)
    assert caplog.messages == [] and not (tmp_path / "metrics.damaged.jsonl").exists()
