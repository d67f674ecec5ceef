"""Makes `run/`: a run of the version whose optimizer state covered the whole tree, with its checkpoint of step 4.

In a checkout of that version (it has qlora_jax/train/pages.py): PYTHONPATH=. python …/tests/cli/earlier_run/make.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Stands for the folder that the run was made in, with model, rows and run.
PLACE = "@FOLDER@"
CHECKPOINT, STEPS = 4, 7
# A schedule, dropout and clipping: all that a resumed step depends on.
OVERRIDES = (
    f"train.steps={STEPS}",
    f"train.save_every={CHECKPOINT}",
    f"train.eval_every={CHECKPOINT}",
    "optim.schedule=linear",
    "optim.warmup_ratio=0.3",
    "lora.rank=2",
    "data.cache=false",
)
# What else lies in a run folder is not read by a start that goes on.
KEPT = ("config.json", "run.json", "metrics.jsonl", "checkpoints", "adapter")


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    from qlora_jax.cli.train import main as train
    from tests.cli.commands import command
    from tests.cli.tiny import make_model, write_config, write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder / "config.py", make_model(folder / "model"), write_rows(folder / "rows.jsonl"))
        run = folder / "run"
        assert train(command(folder, run, *OVERRIDES)) == 0
        shutil.rmtree(run / "checkpoints" / str(STEPS))
        # The version itself goes on from its checkpoint to the same bits, with pages and without.
        for offload in ("none", "host"):
            again = shutil.copytree(run, folder / f"again-{offload}")
            assert train(command(folder, again, *OVERRIDES, f"optim.offload={offload}")) == 0
            assert losses(again) == losses(run)
            adapter = "adapter/adapter_model.safetensors"
            assert (again / adapter).read_bytes() == (run / adapter).read_bytes()
        store(run, folder)


def losses(run: Path) -> list[tuple]:
    """Steps, losses and norms of a run's metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(row.get(name) for name in ("step", "loss", "grad_norm", "eval_loss")) for row in rows]


def store(run: Path, folder: Path) -> None:
    """Copies what is kept of the run, with PLACE for the folder."""
    kept = HERE / "run"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(run, kept, ignore=lambda at, names: set(names) - set(KEPT) if Path(at) == run else set())
    for file in kept.rglob("*"):
        if file.is_file() and str(folder).encode() in (content := file.read_bytes()):
            file.write_bytes(content.replace(str(folder).encode(), PLACE.encode()))


if __name__ == "__main__":
    main()
