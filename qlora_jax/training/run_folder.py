"""The folder of a run: what it holds, and whether a start may go on in it."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_jax.config import Config, from_dict, may_change, to_dict
from qlora_jax.io.chat_template import Templates, write_chat_template
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.training.assumptions import changes
from qlora_jax.training.lock import LOCK, RunLock

RECORD = "config.json"
UNFINISHED_RECORD = "config.tmp"  # all that a process killed at once may leave in a new folder
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
RESULTS = (SUMMARY, "adapter", "model")  # what a finished run has; earlier versions wrote no summary
BEGUN = "run.json"  # when it was begun
CHANGES = "changes.jsonl"  # what train.resume_with=changed was said of


def check_run_folder(config: Config) -> Path:
    """`config.output_dir`, which a run may use. Writes nothing.

    Raises:
      ValueError: it is not set, or holds something that is no run.
    """
    if not config.output_dir:
        raise ValueError("config.output_dir is not set: pass --config.output_dir=FOLDER for this run's files")
    folder = Path(config.output_dir)
    if (folder / RECORD).exists():
        read_record(folder)
    elif folder.exists() and (not folder.is_dir() or _holds_something(folder)):
        raise ValueError(f"config.output_dir={str(folder)!r} is not empty and holds no run: choose another folder")
    return folder


def check_same_run(config: Config) -> None:
    """Refuses a run folder that holds a run with another configuration. Raises ValueError."""
    folder = Path(config.output_dir)
    if not (folder / RECORD).exists():
        return
    said = config.train.resume_with == "changed"
    changed = _differences(folder, config, but=may_change("said") if said else frozenset())
    if not changed:
        return
    hint = "choose another --config.output_dir, or delete that folder"
    if not said and not _differences(folder, config, but=may_change("said")):
        hint = "choose another --config.output_dir, or go on with the change by --config.train.resume_with=changed"
    raise ValueError(f"{folder} holds another run ({'; '.join(changed[:4])}): {hint}")


def enter_run_folder(lock: RunLock, config: Config, *, begun: bool) -> None:
    """Takes the lock of the run folder, creating it where it is new.

    Args:
      begun: whether the folder held a run when it was looked at.

    Raises:
      ValueError: another process trains in it, or has begun a run in it since.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    if (folder / RECORD).exists() and not begun:
        raise ValueError(f"another process has begun a run in {folder} meanwhile: run the same command again")


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


def check_assumptions(config: Config, step: int, now: Mapping[str, Any]) -> list[str]:
    """What is otherwise than it was for the checkpoint of `step`, in words; empty for an unchanged run.

    Raises:
      ValueError: something is, and train.resume_with=changed is not said.
    """
    folder = Path(config.output_dir)
    with closing(open_checkpoints(folder, config)) as checkpoints:
        changed = changes(checkpoints.meta(step), now, config)
    if changed and config.train.resume_with != "changed":
        raise ValueError(
            f"the run in {folder} does not go on from step {step} as it was begun: {'; '.join(changed)}. Bring back "
            f"what it was begun with, choose another --config.output_dir, or go on all the same, which {CHANGES} will "
            f"say, with --config.train.resume_with=changed"
        )
    return [*_differences(folder, config), *changed]


def finished_beyond(config: Config, steps: int) -> bool:
    """Whether the run has more steps than are asked for, and has its result: it is then to be left alone.

    Raises:
      ValueError: it has more, and no result.
    """
    folder = Path(config.output_dir)
    last = max(Checkpoints.steps_in(folder / CHECKPOINTS), default=0)
    if config.train.resume != "auto" or last <= steps:
        return False
    if any((folder / name).exists() for name in RESULTS):
        return True
    raise ValueError(
        f"{folder} holds a checkpoint of step {last}, and {steps} steps are asked for: ask for {last} to end the run "
        f"there, for more to go on, or name a checkpoint with --config.train.resume=STEP, after which later ones go"
    )


def open_checkpoints(folder: Path, config: Config) -> Checkpoints:
    """The checkpoints of a run folder; creates their folder where there is none."""
    return Checkpoints(folder / CHECKPOINTS, keep=config.train.keep, keep_best=config.train.keep_best)


def begun(folder: Path) -> datetime:
    """When the run was begun, the date that templates are told which write one; now for a new run."""
    file = folder / BEGUN
    return datetime.fromisoformat(json.loads(file.read_text())["begun"]) if file.exists() else datetime.now()


def record_run(
    config: Config,
    chat_template: Templates | None,
    today: datetime,
    changed: Mapping[str, Any] | None = None,
) -> None:
    """Writes the resolved configuration, the chat template and when it was begun into the run folder.

    `changed` is added to changes.jsonl: {"step", "changed"}, from which step on what is otherwise.
    """
    folder = Path(config.output_dir)
    _write_json(folder / RECORD, to_dict(config))
    _write_json(folder / BEGUN, {"begun": today.isoformat(timespec="seconds")})
    if chat_template is not None:
        write_chat_template(folder, chat_template)
    if changed:
        with (folder / CHANGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(changed) + "\n")


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """What record_run was given as `changed`, oldest first."""
    file = folder / CHANGES
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


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
    _write_json(folder / SUMMARY, summary)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(value, indent=2) + "\n")
    fresh.replace(file)


def _holds_something(folder: Path) -> bool:
    return any(entry.name not in (UNFINISHED_RECORD, LOCK) for entry in folder.iterdir())


def _differences(folder: Path, config: Config, but: frozenset[str] = frozenset()) -> list[str]:
    """The fields of the configuration that decide what is learned and are not as the folder records them, in words.

    A field that its version did not have yet counts as its default. Those in `but` are left out.
    """
    before, now = _flat(_as_json(from_dict(read_record(folder)))), _flat(_as_json(config))
    changed = [name for name in now if name not in but | may_change("free") and before.get(name) != now[name]]
    return [f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed]


def _as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and not name.endswith("_pattern"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
