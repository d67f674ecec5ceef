"""A base whose embedding and output layer are quantized too, from training to the merged model."""

import json

import pytest

from qlora_jax.cli.evaluate import main as evaluate
from qlora_jax.cli.export import main as export
from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.train import main as train
from tests.cli.commands import command, exit_code

STORED = ("quant.embedding=nf4", "quant.lm_head=int8", "quant.double=false", "train.vocab_chunk=128")


@pytest.fixture(scope="module")
def run(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "run"
    assert exit_code(train, command(sound, folder, *STORED)) == 0
    return folder


def loss(capsys, *arguments) -> float:
    capsys.readouterr()
    assert exit_code(evaluate, [*arguments, "--dtype", "fp32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


def test_every_command_sees_what_training_saw(run, sound, tmp_path, capsys):
    record = json.loads((run / "adapter" / "qlora_jax.json").read_text())
    assert {name: record[name] for name in ("double", "embedding", "lm_head")} == {
        "double": False,
        "embedding": "nf4",
        "lm_head": "int8",
    }
    rows = ("--data", sound / "rows.jsonl")
    adapted = ("--model", sound / "model", "--adapter", run / "adapter")
    trained = loss(capsys, *adapted, "--quant", "nf4", *rows)
    merged = ["--run", run, "--out", tmp_path / "merged", "--format", "merged", "--merge-into", "dequantized"]
    assert exit_code(export, merged) == 0
    assert loss(capsys, "--model", tmp_path / "merged", *rows) == pytest.approx(trained, rel=1e-4)
    assert loss(capsys, *adapted, "--quant", "none", *rows) != pytest.approx(trained, rel=1e-4)
    assert exit_code(generate, [*adapted, "--quant", "nf4", "--prompt", "say 3:", "--max-new-tokens", "3"]) == 0


def test_another_storage_is_another_run(run, sound, capsys):
    words = ("quant.embedding was 'nf4', now 'int8'", "choose another --config.output_dir")
    assert exit_code(train, command(sound, run, *STORED, "quant.embedding=int8")) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words)
