"""A folder of something else, an adapter for another base, a full disk: nothing that was there is lost."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qlora_jax.cli.evaluate import main as evaluate
from qlora_jax.cli.export import main as export
from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.train import main as train
from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from qlora_jax.quant.rules import rules_for
from qlora_jax.training.run_folder import explains_full_disk
from tests.cli.commands import SECOND, command, contents, edit_tensor, exit_code

# --- the run's folder


def test_folder_of_another_run(sound, run, fails):
    words = [str(run), "another run", "lora.rank was 4, now 8", "--config.output_dir"]
    fails(train, command(sound, run, "lora.rank=8"), *words)


def test_folder_that_is_no_run(sound, tmp_path, fails):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    fails(train, command(sound, folder), str(folder), "not empty and holds no run", "choose another folder")


def test_folder_that_is_a_file(sound, tmp_path, fails):
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"cat")
    fails(train, command(sound, file), str(file), "choose another folder")


def test_folder_with_a_damaged_record(sound, run, fails):
    (run / "config.json").write_text('{"method": ')
    words = [str(run / "config.json"), "damaged or no run's configuration"]
    fails(train, command(sound, run), *words)
    fails(export, ["--run", run, "--out", run.parent / "new", "--format", "peft"], *words)


def test_folder_of_a_model(sound, model, fails):
    fails(
        train,
        command(sound, model),
        str(model / "config.json"),
        "no run's configuration",
        "choose another folder",
    )


@pytest.mark.parametrize("step", [9, "none"])
def test_checkpoint_to_resume_that_is_not_there(step, sound, run, fails):
    fails(train, command(sound, run, f"train.resume={step}"), f"train.resume={step}", "steps [1, 2, 3]")


def test_checkpoint_to_resume_in_a_new_folder(sound, tmp_path, fails):
    fails(train, command(sound, tmp_path / "new", "train.resume=9"), "train.resume=9", "steps none")


def test_checkpoints_of_another_base(sound, run, fails):
    """The folder of the same name holds other weights than when the run began."""
    original = sound / "model" / SECOND
    kept = original.read_bytes()
    try:
        edit_tensor(sound / "model", lambda value: value * ml_dtypes.bfloat16(2))
        words = [str(run), "content hash", f"model.path={str(sound / 'model')!r}", "original base"]
        fails(train, command(sound, run, "train.steps=4"), *words)
    finally:
        original.write_bytes(kept)


# --- adapters and exports


def test_adapter_for_another_base(sound, model, run, tmp_path, fails):
    edit_tensor(model, lambda value: value * ml_dtypes.bfloat16(2))
    words = ["adapter for another base", str(sound / "model"), "content hash", "it was trained on"]
    adapter = ["--model", model, "--adapter", run / "adapter"]
    fails(generate, [*adapter, "--prompt", "say"], *words)
    fails(evaluate, [*adapter, "--data", sound / "rows.jsonl"], *words)
    for form in ("merged", "bnb4"):
        fails(export, ["--run", run, "--out", tmp_path / "new", "--format", form, "--model", model], *words)


def test_adapter_for_a_smaller_model(sound, run, tmp_path, fails):
    (run / "adapter" / "qlora_jax.json").unlink()
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    wide = {name: np.repeat(a, 2, 1) if "q_proj.lora_A" in name else a for name, a in tensors.items()}
    save_file(wide, run / "adapter" / "adapter_model.safetensors")
    words = ["lora_A of 'model.layers.0.self_attn.q_proj'", "(4, 128)", "needs (4, 64)", "own base"]
    fails(generate, ["--model", sound / "model", "--adapter", run / "adapter", "--prompt", "say"], *words)


def test_adapter_that_is_nowhere(sound, tmp_path, fails):
    words = [str(tmp_path / "absent"), "is not a folder"]
    fails(generate, ["--model", sound / "model", "--adapter", tmp_path / "absent", "--prompt", "say"], *words)


@pytest.mark.parametrize("form", ["peft", "merged", "bnb4"])
def test_export_over_something_else(form, run, fails):
    photos = run.parent / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    fails(export, ["--run", run, "--out", photos, "--format", form], str(photos), "not empty", "'cat.jpg'")


def test_export_of_what_is_no_run(sound, tmp_path, fails):
    arguments = ["--run", tmp_path / "absent", "--out", tmp_path / "new", "--format", "peft"]
    fails(export, arguments, "absent", "no run folder", "output_dir")


def test_export_of_a_step_that_is_not_there(run, tmp_path, fails):
    arguments = ["--run", run, "--out", tmp_path / "new", "--format", "peft", "--step", "9"]
    fails(export, arguments, "--step 9", "steps [1, 2, 3]")


def test_export_of_an_unfinished_run(run, tmp_path, fails):
    shutil.rmtree(run / "adapter")
    arguments = ["--run", run, "--out", tmp_path / "new", "--format", "merged"]
    fails(export, arguments, "not finished", "--step", "[1, 2, 3]")


# --- while training and saving


def test_loss_that_is_no_number(sound, tmp_path, capsys):
    arguments = command(sound, tmp_path / "new", "optim.learning_rate=1e30", "optim.warmup_ratio=0")
    assert exit_code(train, arguments) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for words in (
        "diverged",
        "last checkpoint is of step ",
        "new output_dir",
        "optim.learning_rate (now 1e+30)",
    ):
        assert words in line


@pytest.fixture
def full_disk(monkeypatch):
    """Leaves 1,000 bytes free, as far as anybody asks."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))


def test_disk_full_when_a_checkpoint_is_due(sound, run, full_disk, monkeypatch, capsys):
    before = contents(run / "checkpoints")
    more = command(sound, run, "train.steps=4")
    assert exit_code(train, more) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for words in (
        f"the disk of {run} is full",
        "1,000 are free",
        "free some space, then run the same command",
    ):
        assert words in line
    assert contents(run / "checkpoints") == before

    monkeypatch.undo()
    assert exit_code(train, more) == 0
    assert "continuing from the checkpoint of step 3" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 406 bytes: No space left on device [os_error_code='28']"),
    ],
)
def test_disk_that_fills_up_while_a_file_is_written(error, tmp_path):
    expected = re.escape(f"the disk of {tmp_path} is full (") + ".*: free some space, then run the same command"
    with pytest.raises(OSError, match=expected), explains_full_disk(tmp_path):
        raise error


def test_other_errors_are_no_full_disk(tmp_path):
    with pytest.raises(PermissionError, match="^.Errno 13. no$"), explains_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize("form", ["peft", "merged", "bnb4"])
def test_disk_too_full_for_an_export(form, run, tmp_path, full_disk, fails):
    arguments = ["--run", run, "--out", tmp_path / "new", "--format", form]
    fails(export, arguments, str(tmp_path / "new"), "bytes", "1,000 free", "choose another folder")


@pytest.fixture
def disk_that_fills_up(monkeypatch):
    """Every safetensors file ends after 1,000 bytes."""

    def save(tensors, file, metadata):
        Path(file).write_bytes(bytes(1000))
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("qlora_jax.io.shards.save_file", save)


@pytest.mark.parametrize("form", ["merged", "bnb4"])
def test_disk_that_fills_up_during_an_export(form, run, tmp_path, disk_that_fills_up, fails):
    arguments = ["--run", run, "--out", tmp_path / "new", "--format", form]
    fails(export, arguments, str(tmp_path / "new"), "bytes", "free", "choose another folder")


def test_disk_that_fills_up_under_a_full_fine_tune(sound, tmp_path, disk_that_fills_up):
    trained = load_model(sound / "model", dtype="bfloat16", rules=rules_for("none")).model
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"of an earlier step")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"model needs [0-9,]+ bytes.*choose another folder"):
        write_model(trained, tmp_path / "model", sound / "model")
    assert contents(tmp_path) == before


# --- the model's small files

NO_OBJECT = ["", "{", "[]", "null", "5", '"x"', "[" * 100_000, "\0"]
SMALL_FILES = {
    "config.json": [*NO_OBJECT, "{}"],
    "generation_config.json": [*NO_OBJECT, '{"eos_token_id": "2"}', '{"eos_token_id": [[1]]}'],
    "tokenizer.json": [*NO_OBJECT, "{}"],
    "tokenizer_config.json": NO_OBJECT,
    "model.safetensors.index.json": [*NO_OBJECT, "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}'],
    "qlora_jax.json": [*NO_OBJECT, "{}", '{"base_hash": 5}'],
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_that_hold_something_else(name, sound, model, capsys):
    file = model / name
    for text in SMALL_FILES[name]:
        file.write_text(text)
        assert exit_code(generate, ["--model", model, "--prompt", "say", "--max-new-tokens", "1"]) == 1, text
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert name.split("_")[0].split(".")[0] in line, (text, line)
