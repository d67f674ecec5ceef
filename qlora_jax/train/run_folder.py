"""The folder of a run: what it holds, and whether a start may go on in it."""

import errno
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.train.config import Config, to_dict

RECORD = "config.json"
UNFINISHED_RECORD = "config.tmp"  # all that a process killed at once may leave in a new folder
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"

# Fields that may differ when a run is continued: they change how long or how it is watched, not what is learned.
MAY_CHANGE = {
    "output_dir",
    "data.samples",
    "data.test",
    "model.kernels",
    "optim.offload",
    "train.steps",
    "train.epochs",
    "train.remat",
    "train.loss_chunk",
    "train.vocab_chunk",
    "train.mlp_chunk",
    "train.save_every",
    "train.eval_every",
    "train.eval_rows",
    "train.keep",
    "train.keep_best",
    "train.resume",
    "train.log_every",
}


def check_run_folder(config: Config) -> Path:
    """`config.output_dir`, which this run may use. Writes nothing.

    Raises:
      ValueError: it is not set, holds something that is no run, or a run with another configuration.
    """
    if not config.output_dir:
        raise ValueError("config.output_dir is not set: pass --config.output_dir=FOLDER for this run's files")
    folder = Path(config.output_dir)
    if (folder / RECORD).exists():
        _refuse_other_run(folder, config)
    elif folder.exists() and (not folder.is_dir() or _holds_something(folder)):
        raise ValueError(f"config.output_dir={str(folder)!r} is not empty and holds no run: choose another folder")
    return folder


def start_step(config: Config) -> int:
    """The step whose checkpoint the run goes on from, by train.resume; 0 for a fresh start.

    Raises:
      ValueError: train.resume names a step that has no checkpoint, or is "none" where there are some.
    """
    resume, folder = config.train.resume, Path(config.output_dir)
    steps = Checkpoints.steps_in(folder / CHECKPOINTS)
    if resume == "none" and steps:
        raise ValueError(
            f"train.resume=none, but {folder} holds checkpoints of steps {steps}: choose another output_dir"
        )
    if isinstance(resume, int) and resume and resume not in steps:
        raise ValueError(f"train.resume={resume}: {folder} holds checkpoints of steps {steps or 'none'}")
    return resume if isinstance(resume, int) else max(steps, default=0)


def check_same_base(config: Config, step: int, content_hash: str) -> None:
    """Refuses to go on from the checkpoint of `step` on a base with another content hash. Raises ValueError."""
    folder = Path(config.output_dir)
    with closing(open_checkpoints(folder, config)) as checkpoints:
        recorded = checkpoints.meta(step)["base_hash"]
    if recorded != content_hash:
        raise ValueError(
            f"the checkpoints in {folder} were trained on a base with content hash {recorded}, but "
            f"model.path={config.model.path!r} has {content_hash}: point model.path at the original base"
        )


def open_checkpoints(folder: Path, config: Config) -> Checkpoints:
    """The checkpoints of a run folder; creates their folder where there is none."""
    return Checkpoints(folder / CHECKPOINTS, keep=config.train.keep, keep_best=config.train.keep_best)


def record_run(config: Config) -> None:
    """Creates the run folder where it is new and writes the resolved configuration to its config.json."""
    record = Path(config.output_dir) / RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    fresh = record.with_name(UNFINISHED_RECORD)
    fresh.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    fresh.replace(record)


@contextmanager
def explains_full_disk(folder: Path) -> Iterator[None]:
    """Turns what a full disk raises in the block into one OSError (ENOSPC) that says how to go on."""
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore, which writes Orbax's arrays, raises ValueError.
        if getattr(error, "errno", None) != errno.ENOSPC and f"os_error_code='{errno.ENOSPC}'" not in str(error):
            raise
        detail = getattr(error, "strerror", None) or "while saving a checkpoint"
        message = f"the disk of {folder} is full ({detail}): free some space, then run the same command, which goes on"
        raise OSError(errno.ENOSPC, f"{message} from the last checkpoint") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.json. ValueError where it is not a run's."""
    record = folder / RECORD
    try:
        settings = json.loads(record.read_text())
    except ValueError:  # no JSON, or no text
        settings = None
    if not isinstance(settings, dict) or "method" not in settings:
        raise ValueError(f"{record} is damaged or no run's configuration: choose another folder")
    return settings


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, whole or not at all: the sign that the run is complete, and its figures for programs."""
    fresh = (folder / SUMMARY).with_suffix(".tmp")
    fresh.write_text(json.dumps(summary, indent=2) + "\n")
    fresh.replace(folder / SUMMARY)


def _holds_something(folder: Path) -> bool:
    return any(entry.name != UNFINISHED_RECORD for entry in folder.iterdir())


def _refuse_other_run(folder: Path, config: Config) -> None:
    before, now = _flat(read_record(folder)), _flat(json.loads(json.dumps(to_dict(config))))
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    if changed:
        listing = "; ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed[:4])
        raise ValueError(
            f"{folder} holds another run ({listing}): choose another --config.output_dir, or delete that folder"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and not name.endswith("_pattern"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
