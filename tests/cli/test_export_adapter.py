"""export.py with an adapter of no run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.cli.export import main as export
from tests.cli.commands import exit_code


@pytest.fixture
def adapter(run):
    """The run's adapter as if it came from elsewhere."""
    folder = shutil.copytree(run / "adapter", run.parent / "adapter")
    (folder / "qlora_jax.json").unlink()
    return folder


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", ["merged", "bnb4"])
@pytest.mark.parametrize("named", [True, False])
def test_it_is_merged_as_the_runs_own(form, named, sound, run, adapter, tmp_path):
    words = [] if named else ["--model", sound / "model"]
    assert exit_code(export, ["--run", run, "--format", form, "--out", tmp_path / "of-run"]) == 0
    assert exit_code(export, ["--adapter", adapter, *words, "--format", form, "--out", tmp_path / "alone"]) == 0
    ours, theirs = tensors(tmp_path / "alone"), tensors(tmp_path / "of-run")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_what_it_needs(sound, run, adapter, tmp_path, fails):
    out = ["--out", tmp_path / "new"]
    fails(export, [*out, "--format", "merged"], "one of the arguments --run --adapter is required", code=2)
    fails(export, [*out, "--format", "merged", "--run", run, "--adapter", adapter], "not allowed with", code=2)
    fails(export, [*out, "--format", "peft", "--adapter", adapter], "--format merged or bnb4")
    fails(export, [*out, "--format", "merged", "--adapter", adapter, "--step", "2"], "without --step")
    fails(export, [*out, "--format", "merged", "--adapter", tmp_path / "absent"], "absent", "names no base model")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone/./away"}))
    fails(export, [*out, "--format", "merged", "--adapter", adapter], "'gone/./away' is no folder")


def test_a_base_that_is_an_adapter(adapter, tmp_path, fails):
    arguments = ["--adapter", adapter, "--model", adapter, "--format", "merged", "--out", tmp_path / "new"]
    fails(export, arguments, "is an adapter, no model")
