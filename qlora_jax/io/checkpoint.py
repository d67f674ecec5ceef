"""Checkpoints of a run with Orbax: the adapters and the optimizer's state, never the base."""

import errno
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# What Orbax writes beside the arrays: indexes, shardings, metadata.
OVERHEAD = 500_000
# Earlier versions kept an optimizer that was masked over (trained, frozen), so that its state lay inside of Optax' own,
# and each moment was the first of two trees.
MASKED = ".inner_states[True].inner_state"


class Checkpoints:
    """The checkpoints of one run, `folder/<step>/`: written asynchronously, complete or not there at all.

    The last `keep` are kept, and with `keep_best` the one with the lowest eval_loss.
    """

    def __init__(self, folder: Path, *, keep: int, keep_best: bool):
        preserve: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
        if keep_best:
            preserve.append(
                ocp.checkpoint_managers.BestN(get_metric_fn=_negative_loss, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(preserve),
            enable_async_checkpointing=True,
            best_fn=_negative_loss,
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int:
        """The step with the lowest eval_loss. ValueError where none was evaluated."""
        step = self._manager.best_step()
        if step is None:
            raise ValueError("no checkpoint of this run was evaluated: set data.eval, or name a step")
        if not math.isfinite(self._manager.metrics(step)["eval_loss"]):
            raise ValueError("no checkpoint of this run has a finite eval_loss: name a step")
        return step

    def save(self, step: int, adapters: Any, opt_state: Any, meta: dict[str, Any], metrics: dict | None = None) -> None:
        """Starts writing a checkpoint. `meta` is JSON: base hash, seed, data position, configuration.

        Raises:
          OSError: too little room on the disk (ENOSPC); nothing of this checkpoint is left behind.
        """
        if step in self._manager.all_steps():
            return
        self._check_room(adapters, opt_state)
        items = ocp.args.Composite(
            adapters=ocp.args.StandardSave(_leaves(adapters)),
            optimizer=ocp.args.StandardSave(_leaves(opt_state)),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=items, metrics=metrics)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Notes what an evaluation of a checkpoint gave that was saved without one, all of it or nothing."""
        whole = self._folder / str(step) / "metrics"  # where Orbax keeps them
        partial = whole.with_name(".metrics")
        if whole.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "metrics").write_text(json.dumps(metrics))
        partial.rename(whole)
        self._manager.reload()

    def _check_room(self, *trees: Any) -> None:
        """A disk that fills up while Orbax writes makes its threads print a hundred tracebacks: look before."""
        self.wait()
        needed = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"a checkpoint needs {needed:,} bytes, {free:,} are free")

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: a run that goes on from `step` will write them again."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, **trees: Any) -> dict[str, Any]:
        """The named items ("adapters", "optimizer") of a step, in the structure and dtypes of those given."""
        names = {item: self._stored_names(step, item) for item in trees}
        items = {
            item: ocp.args.StandardRestore({names[item].get(path, path): leaf for path, leaf in _leaves(tree).items()})
            for item, tree in trees.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: _like(tree, restored[item], names[item]) for item, tree in trees.items()}

    def _stored_names(self, step: int, item: str) -> dict[str, str]:
        """Under which name each leaf of an item was stored, by the path that it has today."""
        handler = ocp.StandardCheckpointHandler()
        stored = list(handler.metadata(self._folder.absolute() / str(step) / item).tree)
        handler.close()
        return {_path_today(name): name for name in stored}

    @staticmethod
    def steps_in(folder: Path) -> list[int]:
        """Steps of the complete checkpoints in a folder, oldest first."""
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong while writing it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the manager's threads."""
        self._manager.close()


def _negative_loss(metrics: dict) -> float:
    """To be as high as can be; what is no number, as earlier versions recorded it, is the worst."""
    loss = metrics["eval_loss"]
    return -math.inf if math.isnan(loss) else -loss


def _leaves(tree: Any) -> dict[str, Any]:
    """The tree as a flat dictionary by path: readable on disk without our classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _path_today(stored: str) -> str:
    if not stored.startswith(MASKED):
        return stored
    return re.sub(r"(\.[mn]u)\[0\]", r"\1", stored.removeprefix(MASKED), count=1)


def _like(tree: Any, leaves: dict[str, Any], names: dict[str, str]) -> Any:
    return jax.tree.map_with_path(lambda path, _: leaves[names[jax.tree_util.keystr(path)]], tree)
