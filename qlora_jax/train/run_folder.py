"""The folder of a run: what it holds, and whether a start may go on in it."""

import json
from pathlib import Path
from typing import Any

from qlora_jax.train.config import Config, to_dict

RECORD = "config.json"

# Fields that may differ when a run is continued: they change how long or how it is watched, not what is learned.
MAY_CHANGE = {
    "output_dir",
    "data.samples",
    "train.steps",
    "train.epochs",
    "train.remat",
    "train.loss_chunk",
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
        _refuse_other_run(folder / RECORD, config)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"config.output_dir={str(folder)!r} is not empty and holds no run: choose another folder")
    return folder


def record_run(config: Config) -> None:
    """Creates the run folder where it is new and writes the resolved configuration to its config.json."""
    record = Path(config.output_dir) / RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    fresh = record.with_suffix(".tmp")
    fresh.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    fresh.replace(record)


def _refuse_other_run(record: Path, config: Config) -> None:
    before, now = _flat(json.loads(record.read_text())), _flat(json.loads(json.dumps(to_dict(config))))
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    if changed:
        listing = "; ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed[:4])
        raise ValueError(
            f"{record.parent} holds another run ({listing}): choose another --config.output_dir, or delete that folder"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and not name.endswith("_pattern"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
