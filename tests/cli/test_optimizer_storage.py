"""Runs with the optimizer's storage options, stopped and continued."""

import shutil

from qlora_jax.cli.train import main as train
from tests.cli.commands import command, exit_code
from tests.cli.test_resume import rows, saved

NARROW = ("optim.moments=bf16", "optim.gradients=bf16", "train.steps=4", "train.save_every=2", "train.eval_every=0")
PAGED = (*NARROW, "optim.offload=host")


def test_a_run_goes_on_with_the_same_storage_alone(sound, tmp_path, fails):
    """A paged run continued from a checkpoint ends with the same rows; another storage is another run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert exit_code(train, command(sound, whole, *PAGED)) == 0
    shutil.copytree(whole, run)
    assert exit_code(train, command(sound, run, *PAGED, "train.resume=2")) == 0
    assert rows(run) == rows(whole)
    assert saved(run) == saved(whole) == [2, 4]
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    for changed in ("optim.moments=fp32", "optim.gradients=fp32"):
        fails(train, command(sound, run, *PAGED, changed), "another run", f"{changed[:-5]} was 'bf16', now 'fp32'")


def test_pages_may_be_given_up_and_taken_up_again(sound, run):
    """The sound run, whose moments are in float32: continued with pages, it has the same rows."""
    before = rows(run)
    assert exit_code(train, command(sound, run, "optim.offload=host", "train.resume=1")) == 0
    assert rows(run) == before
    assert exit_code(train, command(sound, run, "train.resume=2")) == 0
    assert rows(run) == before
