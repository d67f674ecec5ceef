"""A run goes on as it was begun, or says what was changed."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from qlora_jax.cli.train import main as train
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.training import run_folder
from tests.cli.commands import command, contents, exit_code
from tests.cli.test_resume import last_step, rows
from tests.cli.tiny import write_rows

CHANGED = "train.resume_with=changed"


@pytest.fixture
def begun(sound, tmp_path) -> Path:
    """A copy of the finished run, and of its rows, which may be changed."""
    shutil.copytree(sound / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def other_rows(sound, fails):
    """The same file with other rows in it, while the test runs."""
    file = sound / "rows.jsonl"
    before = file.read_bytes()
    write_rows(file, 30)
    yield
    file.write_bytes(before)


def test_other_rows_are_refused_and_nothing_is_touched(sound, begun, other_rows, fails):
    words = (
        "training rows are others (18 with ",
        "22 with ",
        "evaluation rows are others",
        CHANGED,
        "--config.output_dir",
    )
    fails(train, command(sound, begun, "train.steps=5"), *words)


def test_other_rows_are_taken_where_that_is_said_and_written_down(sound, begun, other_rows, capsys):
    assert exit_code(train, command(sound, begun, "train.steps=5", CHANGED)) == 0
    assert "going on from step 3 with changes: the training rows are others" in capsys.readouterr().err
    [line] = [json.loads(line) for line in (begun / "changes.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and line["changed"][0].startswith("the training rows are others")
    assert "Changed at step 3" in (begun / "report.html").read_text()
    assert last_step(begun) == 5
    # From then on these are the run's rows.
    assert exit_code(train, command(sound, begun, "train.steps=6")) == 0
    assert len((begun / "changes.jsonl").read_text().splitlines()) == 1


def test_a_template_that_writes_the_date_keeps_the_runs_own(sound, tmp_path, monkeypatch):
    class Earlier(datetime):
        @classmethod
        def now(cls):
            return datetime(2020, 2, 29)

    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    settings = (
        f"data.chat_template={tmp_path / 'dated.jinja'}",
        f"data.train={tmp_path / 'chats.jsonl'}",
        *("data.eval=", "data.samples=0", "train.eval_every=0", "train.seq_len=64"),
    )
    with monkeypatch.context() as patches:
        patches.setattr(run_folder, "datetime", Earlier)
        assert exit_code(train, command(sound, tmp_path / "run", *settings)) == 0
    assert exit_code(train, command(sound, tmp_path / "run", *settings, "train.steps=4")) == 0
    assert last_step(tmp_path / "run") == 4


def test_a_schedule_is_not_bent(sound, tmp_path, fails):
    run, cosine = tmp_path / "run", "optim.schedule=cosine"
    assert exit_code(train, command(sound, run, cosine, "train.eval_every=0")) == 0
    longer = (cosine, "train.eval_every=0", "train.steps=5")
    fails(train, command(sound, run, *longer), "learning rate of step 4 was to be 0 ", "run of 3 steps", CHANGED)
    assert exit_code(train, command(sound, run, *longer, CHANGED)) == 0
    assert "learning rate of step 4" in (run / "changes.jsonl").read_text()


@pytest.mark.parametrize(
    "change, allowed",
    [("optim.learning_rate=1e-3", True), ("lora.rank=2", False), ("seed=1", False)],
)
def test_the_configuration(sound, begun, fails, change, allowed):
    """What is learned from may change where that is said; what is trained may not."""
    name = change.partition("=")[0]
    hint = CHANGED if allowed else "or delete that folder"
    fails(train, command(sound, begun, change, "train.steps=4"), "holds another run", f"{name} was ", hint)
    if not allowed:
        fails(train, command(sound, begun, change, "train.steps=4", CHANGED), f"{name} was ", hint)
        return
    assert exit_code(train, command(sound, begun, change, "train.steps=4", CHANGED)) == 0
    assert f"{name} was " in (begun / "changes.jsonl").read_text()


def test_a_finished_run_with_fewer_steps_is_left_alone(sound, begun, capsys):
    before = contents(begun)
    assert exit_code(train, command(sound, begun, "train.steps=2")) == 0
    assert "holds a finished run of more than 2 steps: it is left as it is" in capsys.readouterr().err
    assert contents(begun) == before


def test_an_unfinished_one_says_what_can_be_asked_for(sound, begun, fails):
    (begun / "summary.json").unlink()
    shutil.rmtree(begun / "adapter")
    fails(
        train, command(sound, begun, "train.steps=2"), "holds a checkpoint of step 3", "ask for 3", "train.resume=STEP"
    )


def test_a_run_of_an_earlier_version_goes_on(sound, begun, monkeypatch):
    """Its checkpoints say nothing about rows, and its configuration lacks the newest fields."""
    whole = Checkpoints.meta
    monkeypatch.setattr(
        Checkpoints, "meta", lambda self, step: {k: v for k, v in whole(self, step).items() if k != "assumes"}
    )
    settings = json.loads((begun / "config.json").read_text())
    del settings["train"]["resume_with"], settings["data"]["packing"], settings["quant"]["lm_head"]
    (begun / "config.json").write_text(json.dumps(settings))
    assert exit_code(train, command(sound, begun, "train.steps=4")) == 0
    assert [row["step"] for row in rows(begun) if "loss" in row] == [1, 2, 3, 4]
