"""Whatever is wrong with the input, a command says so in one line and leaves the user's files as they were."""

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
from qlora_jax.cli.quantize import main as quantize
from qlora_jax.cli.train import main as train
from qlora_jax.io.hf import load_model
from qlora_jax.io.save import write_model
from qlora_jax.train.run_folder import explains_full_disk
from tests.cli.tiny import make_model, write_config, write_rows, write_tokenizer

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with a model, rows, a configuration and a finished run of them."""
    folder = tmp_path_factory.mktemp("sound")
    model, rows = make_model(folder / "model"), write_rows(folder / "rows.jsonl")
    config = write_config(folder / "config.py", model, rows)
    assert train(["--config", str(config), f"--config.output_dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def model(sound, tmp_path) -> Path:
    """A copy of the model, for damaging."""
    return shutil.copytree(sound / "model", tmp_path / "damaged")


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(sound / "run", tmp_path / "run")


@pytest.fixture
def fails(tmp_path, capsys):
    """`fails(main, argv, *words)`: the command ends with `code` and one line with the words, and changes no file."""

    def check(main, argv, *words: str, code: int = 1) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert exit_code(main, argv) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        [line] = [line for line in printed.err.splitlines() if "error: " in line]
        assert printed.err.endswith(line + "\n")
        assert [word for word in words if word not in line] == [], line
        assert contents(tmp_path) == before
        return line

    return check


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes by its path; None for a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def exit_code(main, argv) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def command(sound: Path, out: Path, *more: str) -> list[str]:
    """The arguments of the sound training run, into another folder and with overrides such as `lora.rank=2`."""
    overrides = [f"--config.{change}" for change in more]
    return ["--config", str(sound / "config.py"), f"--config.output_dir={out}", *overrides]


# --- the model's files


def remove_shard(model: Path) -> None:
    (model / SECOND).unlink()


def truncate_shard(model: Path) -> None:
    with (model / SECOND).open("r+b") as file:
        file.truncate(5000)


def empty_shard(model: Path) -> None:
    (model / SECOND).write_bytes(b"")


def edit_index(model: Path, name: str, file: str) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][name] = file
    (model / INDEX).write_text(json.dumps(index))


def edit_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def edit_tensor(model: Path, change) -> None:
    tensors = load_file(model / SECOND)
    tensors[Q_PROJ] = change(tensors[Q_PROJ])
    save_file(tensors, model / SECOND, metadata={"format": "pt"})


DAMAGES = {
    "missing shard": (remove_shard, [INDEX, SECOND, "download it again"]),
    "truncated shard": (truncate_shard, [SECOND, "5000 bytes", "truncated", "download it again"]),
    "empty shard": (empty_shard, [SECOND, "0 bytes", "truncated", "download it again"]),
    "index names an absent file": (
        lambda model: edit_index(model, Q_PROJ, "model-00003-of-00002.safetensors"),
        [INDEX, "model-00003-of-00002.safetensors", "not in the folder"],
    ),
    "index places a tensor elsewhere": (
        lambda model: edit_index(model, Q_PROJ, FIRST),
        [INDEX, Q_PROJ, FIRST, "does not hold it"],
    ),
    "index is no JSON": (lambda model: (model / INDEX).write_text("{"), [INDEX, "download it again"]),
    "tensor of integers": (
        lambda model: edit_tensor(model, lambda value: value.astype(np.int64)),
        [SECOND, Q_PROJ, "I64", "expected", "BF16", "F16", "F32"],
    ),
    "tensor of bytes": (
        lambda model: edit_tensor(model, lambda value: value.astype(np.uint8)),
        [SECOND, Q_PROJ, "U8 (64, 64)", "expected", "BF16", "F16", "F32"],
    ),
    "tensor of another shape": (
        lambda model: edit_tensor(model, lambda value: value[:, :32].copy()),
        [SECOND, Q_PROJ, "(64, 32)", "expected", "(64, 64)"],
    ),
    "missing tensors": (
        lambda model: edit_config(model, num_hidden_layers=3),
        ["lacks 9 of", "model.layers.2."],
    ),
    "tensors without a place": (
        lambda model: edit_config(model, num_hidden_layers=1),
        ["holds 9 tensors", "model.layers.1."],
    ),
    "unknown architecture": (
        lambda model: edit_config(model, model_type="gpt2"),
        ["config.json", "'gpt2'", "llama", "mistral", "qwen2", "qwen3"],
    ),
    "no config.json": (lambda model: (model / "config.json").unlink(), ["config.json does not exist"]),
    "config.json is no JSON": (
        lambda model: (model / "config.json").write_text("{,"),
        ["config.json", "no JSON"],
    ),
    "tokenizer of another model": (
        lambda model: write_tokenizer(model, more=8),
        ["266 tokens", "vocab_size is 258", "tokenizer that belongs to this model"],
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ["damaged", "tokenizer.json"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name, sound, model, tmp_path, fails):
    damage, words = DAMAGES[name]
    damage(model)
    fails(train, command(sound, tmp_path / "new", f"model.path={model}"), *words)
    fails(generate, ["--model", model, "--prompt", "say"], *words)


@pytest.mark.parametrize(
    "name", ["missing shard", "truncated shard", "tensor of another shape", "unknown architecture"]
)
def test_damaged_base_of_an_export(name, sound, model, run, tmp_path, fails):
    damage, words = DAMAGES[name]
    damage(model)
    fails(export, ["--run", run, "--out", tmp_path / "new", "--format", "merged", "--model", model], *words)
    fails(quantize, ["--model", model, "--out", tmp_path / "new"], *words)


def test_model_that_is_nowhere(sound, tmp_path, fails):
    absent = tmp_path / "absent"
    fails(train, command(sound, tmp_path / "new", f"model.path={absent}"), str(absent), "ORG/NAME")
    fails(generate, ["--model", absent, "--prompt", "say"], str(absent), "ORG/NAME")


def test_pickled_weights(sound, model, tmp_path, fails):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    words = [str(model), "pickled", "convert them to safetensors"]
    fails(train, command(sound, tmp_path / "new", f"model.path={model}"), *words)


def test_unreachable_hub(sound, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["'nobody/nothing'", "cannot be reached", "--config.model.path=DIR", "--model DIR"]
    fails(train, command(sound, tmp_path / "new", "model.path=nobody/nothing"), *words)
    fails(generate, ["--model", "nobody/nothing", "--prompt", "say"], *words)
    data = ["'nobody/rows'", "Hub did not give it", "local .jsonl"]
    fails(train, command(sound, tmp_path / "new", "data.train=nobody/rows"), *data)


# --- the rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["bad.jsonl", "holds no rows", "at least one"]),
        (
            '{"text": "a"}\n\n{"question": "b"}\n',
            ["bad.jsonl, row 3", "columns question", '{"prompt", "completion"}'],
        ),
        (
            '{"text": "a"}\n{"prompt": "b"}\n',
            ["bad.jsonl, row 2", "columns prompt", '{"prompt", "completion"}'],
        ),
        ('{"text": "a"}\n{"text": 3}\n', ["bad.jsonl, row 2", "'text' must be a string", "int 3"]),
        ('{"text": "a"}\n{"text": \n', ["bad.jsonl, row 2", "not valid JSON"]),
        (
            '{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n',
            ["bad.jsonl, row 2", "chat template"],
        ),
    ],
    ids=["empty", "unknown column", "half a pair", "no text", "no JSON", "no chat template"],
)
def test_rows(text, words, sound, tmp_path, fails):
    rows = tmp_path / "bad.jsonl"
    rows.write_text(text)
    fails(train, command(sound, tmp_path / "new", f"data.train={rows}", "data.eval="), *words)
    fails(evaluate, ["--model", sound / "model", "--data", rows], *words)


def test_rows_that_are_nowhere(sound, tmp_path, fails):
    rows = str(tmp_path / "absent.jsonl")
    fails(train, command(sound, tmp_path / "new", f"data.train={rows}"), rows, ".parquet")
    fails(evaluate, ["--model", sound / "model", "--data", rows], rows, ".parquet")


def test_rows_whose_answers_do_not_fit(sound, tmp_path, fails):
    words = ["24 rows", "train.seq_len=4", "raise train.seq_len"]
    fails(train, command(sound, tmp_path / "new", "train.seq_len=4", "data.eval="), *words)


# --- lengths


def test_sequence_longer_than_the_model(sound, tmp_path, fails):
    words = ["train.seq_len=129", "128 positions", "--config.model.max_position=129"]
    fails(train, command(sound, tmp_path / "new", "train.seq_len=129"), *words)


def test_evaluation_longer_than_the_model(sound, fails):
    arguments = ["--model", sound / "model", "--data", sound / "rows.jsonl", "--seq-len", "129"]
    fails(evaluate, arguments, "--seq-len 129", "128 positions")


def test_generation_longer_than_the_model(sound, fails):
    arguments = ["--model", sound / "model", "--prompt", "say 3:", "--max-new-tokens", "123"]
    fails(generate, arguments, "prompt's 6 tokens", "--max-new-tokens 123", "128 positions")


def test_empty_prompt(sound, fails):
    fails(generate, ["--model", sound / "model", "--prompt", ""], "at least one token")


# --- the configuration


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lora.rnk=4", ["config.lora.rnk is unknown", "did you mean config.lora.rank?"]),
        ("lroa.rank=4", ["config.lroa is unknown", "did you mean config.lora?"]),
        ("train.steps=many", ["config.train.steps='many'", "an integer"]),
        ("lora.rank=0", ["config.lora.rank=0", "at least 1"]),
        ("quant.lm_head=nf5", ["config.quant.lm_head='nf5'", "'none' or 'nf4'"]),
        ("lora.targets=(", ["config.lora.targets='('", "regular expression"]),
    ],
)
def test_configuration(change, words, sound, tmp_path, fails):
    fails(train, command(sound, tmp_path / "new", change), *words, code=2)


def test_configuration_file_that_is_nowhere(tmp_path, fails):
    fails(train, ["--config", tmp_path / "absent.py"], "absent.py does not exist", "configs/7b.py", code=2)


def test_target_that_matches_nothing(sound, tmp_path, fails):
    words = ["'c_attn' matches no module", "down_proj, gate_proj, k_proj, ", "model.layers.0."]
    fails(train, command(sound, tmp_path / "new", "lora.targets=q_proj,c_attn"), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.path", ["model.path=''", "give a folder with a Hugging Face model, or ORG/NAME"]),
        ("data.train", ["config.data.train is not set", "give a .jsonl"]),
        ("output_dir", ["config.output_dir is not set", "--config.output_dir=FOLDER"]),
    ],
)
def test_setting_that_is_missing(name, words, sound, tmp_path, fails):
    fails(train, command(sound, tmp_path / "new", f"{name}="), *words)


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
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    )


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
        ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 406 bytes: No space left on device [os_error_code='28']"
        ),
    ],
)
def test_disk_that_fills_up_while_a_file_is_written(error, tmp_path):
    expected = (
        re.escape(f"the disk of {tmp_path} is full (") + ".*: free some space, then run the same command"
    )
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
    trained = load_model(sound / "model", dtype="bfloat16", quant="none").model
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"of an earlier step")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        write_model(trained, tmp_path / "model", sound / "model")
    assert contents(tmp_path) == before
