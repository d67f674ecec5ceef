"""A run that an earlier version began, whose optimizer covered the whole tree, goes on to the bits of that version."""

import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from qlora_jax.cli.generate import main as generate
from qlora_jax.cli.train import main as train
from qlora_jax.config import from_dict
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.training.run_folder import read_record
from qlora_jax.training.setup import make_trainer
from tests.cli.commands import command, exit_code
from tests.cli.earlier_run.make import CHECKPOINT, OVERRIDES, PLACE, losses
from tests.cli.tiny import make_model, write_config, write_rows

STORED = Path(__file__).parent / "earlier_run" / "run"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A folder with the model, the rows and the run; what the run had after its checkpoint is gone."""
    write_config(tmp_path / "config.py", make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"))
    run = shutil.copytree(STORED, tmp_path / "run")
    for file in (run / "config.json", run / "checkpoints" / str(CHECKPOINT) / "meta" / "metadata"):
        file.write_text(file.read_text().replace(PLACE, str(tmp_path)))
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    # The evaluation of the checkpoint goes, too: the start makes up for it.
    at = next(number for number, row in enumerate(rows) if f'"step": {CHECKPOINT}, "eval_loss"' in row)
    (run / "metrics.jsonl").write_text("".join(rows[:at]))
    return tmp_path


@pytest.mark.parametrize("offload", ["none", "host"])
def test_it_goes_on_to_the_same_bits(earlier, offload, capfd):
    run = earlier / "run"
    assert exit_code(train, command(earlier, run, *OVERRIDES, f"optim.offload={offload}")) == 0
    assert f"continuing from the checkpoint of step {CHECKPOINT}" in capfd.readouterr().err
    got, want = losses(run), losses(STORED)
    ours, theirs = load_file(run / ADAPTER), load_file(STORED / ADAPTER)
    assert len(got) == len(want) and ours.keys() == theirs.keys()
    if same_processor(got, want):
        assert got == want
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    np.testing.assert_allclose(np.array(got, float), np.array(want, float), rtol=1e-3)


def test_its_optimizer_is_restored_leaf_by_leaf(earlier):
    """Every name on disk is that of one leaf of today's state, which gets its bits."""
    folder = (earlier / "run" / "checkpoints" / str(CHECKPOINT) / "optimizer").absolute()
    with closing(ocp.StandardCheckpointHandler()) as handler:
        stored = handler.restore(folder)
    config = from_dict(read_record(earlier / "run"))
    state = make_trainer(config, earlier / "model", 7).opt_state
    with closing(Checkpoints(folder.parent.parent, keep=1, keep_best=False)) as checkpoints:
        restored = checkpoints.restore(CHECKPOINT, optimizer=state)["optimizer"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(restored)}
    assert len(found) == len(stored)
    for name, leaf in stored.items():
        assert name.startswith(".inner_states[True].inner_state")
        ours = name.removeprefix(".inner_states[True].inner_state").replace(".mu[0]", ".mu").replace(".nu[0]", ".nu")
        np.testing.assert_array_equal(found[ours], leaf)


def test_its_adapter_is_read(earlier, capsys):
    words = [
        "--model",
        earlier / "model",
        "--prompt",
        "say 1:",
        "--max-new-tokens",
        8,
        "--quant",
        "nf4",
        "--dtype",
        "fp32",
    ]
    assert exit_code(generate, words) == 0
    plain = capsys.readouterr().out
    assert exit_code(generate, [*words, "--adapter", earlier / "run" / "adapter"]) == 0
    assert capsys.readouterr().out != plain


def same_processor(got: list[tuple], want: list[tuple]) -> bool:
    """Whether the checkpoint's own evaluation has the bits that it had where the run was begun."""
    of_checkpoint = (CHECKPOINT, None, None)
    [ours], [theirs] = ([row for row in rows if row[:3] == of_checkpoint] for rows in (got, want))
    return ours == theirs
