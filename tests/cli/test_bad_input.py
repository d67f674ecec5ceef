"""A model, rows or settings that are wrong: the command says so in one line and changes no file."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.cli.evaluate import main as evaluate
from qlora_jax.cli.export import main as export
from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.quantize import main as quantize
from qlora_jax.cli.train import main as train
from qlora_jax.data import load_tokenizer
from tests.cli.commands import FIRST, Q_PROJ, SECOND, command, edit_tensor, exit_code

INDEX = "model.safetensors.index.json"


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
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ["damaged", "tokenizer.json"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name, sound, model, tmp_path, fails):
    damage, words = DAMAGES[name]
    damage(model)
    fails(train, command(sound, tmp_path / "new", f"model.path={model}"), *words)
    fails(generate, ["--model", model, "--prompt", "say"], *words)


def test_a_tokenizer_with_ids_that_the_model_has_not(sound, model, tmp_path, fails):
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    assert len(tokenizer) == 259
    words = [
        "token '<pad>' has id 258",
        "vocab_size is 258",
        "say <pad>",
        "tokenizer that belongs to this model",
    ]
    fails(generate, ["--model", model, "--prompt", "say <pad> please"], *words)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "say", "completion": "say <pad> please"}) + "\n")
    fails(train, command(sound, tmp_path / "new", f"model.path={model}", f"data.train={rows}"), *words)
    assert exit_code(train, command(sound, tmp_path / "new", f"model.path={model}")) == 0


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
            '\n\n{"question": "b"}\n',
            ["bad.jsonl, row 3", "columns question", '{"prompt", "completion"}'],
        ),
        (
            '\n{"prompt": "b"}\n',
            ["bad.jsonl, row 2", "columns prompt", '{"prompt", "completion"}'],
        ),
        ('\n{"text": 3}\n', ["bad.jsonl, row 2", "'text' must be a string", "int 3"]),
        ('\n{"text": \n', ["bad.jsonl, row 2", "not valid JSON"]),
        (
            '\n{"messages": [{"role": "user", "content": "a"}]}\n',
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
    words = ["24 of 24 rows", "train.seq_len=4", "raise train.seq_len", "max_bad_rows"]
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
        ("quant.lm_head=nf5", ["config.quant.lm_head='nf5'", "'none' or 'nf4' or 'int8'"]),
        ("quant.embedding=int4", ["config.quant.embedding='int4'", "'none' or 'nf4' or 'int8'"]),
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


def test_kernels_by_name_without_a_gpu(sound, tmp_path, fails, monkeypatch):
    words = ["JAX runs on cpu, not on an NVIDIA GPU", "Use kernels='auto' or 'xla'"]
    fails(train, command(sound, tmp_path / "new", "model.kernels=pallas"), "kernels='pallas' cannot run", *words)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("QLORA_JAX_KERNELS", "mosaic")
    fails(train, command(sound, tmp_path / "new"), "kernels='mosaic' cannot run", *words)
    monkeypatch.setenv("QLORA_JAX_KERNELS", "cuda")
    fails(train, command(sound, tmp_path / "new"), "QLORA_JAX_KERNELS='cuda': expected auto, pallas, mosaic, xla")


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
