"""A comparison: which runs it consists of, each an ordinary training run in a folder of its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qlora_jax.compare.formats import write_rounded
from qlora_jax.compare.methods import ABLATIONS, MAIN, Method, distinct
from qlora_jax.config import Config, TrainSection, to_dict
from qlora_jax.data import load_rows
from qlora_jax.io.hf import read_config, resolve_folder
from qlora_jax.training.metrics import read_rows
from qlora_jax.training.run_folder import SUMMARY
from qlora_jax.training.setup import for_geometry, with_method

RECORD = "study.json"
# Multiples of the configuration's learning rate, half a decade apart: one grid for every method. It is walked from the
# middle, downhill.
GRID = (0.1, 0.3, 1.0, 3.0)
SEEDS = {"quick": 1, "default": 3, "ablations": 3}
# How long runs are, as a share of what the configuration says; in a hurry all are shorter.
LENGTHS = {"quick": 0.75, "default": 1.0, "ablations": 1.0}
# How long those are that only choose a learning rate. Much shorter ones choose one that is too high for the whole run.
SEARCH_LENGTHS = {"quick": 0.125, "default": 0.5, "ablations": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `seed` and `rate` are those of its configuration."""

    method: Method
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def rate(self) -> float:
        return self.config.optim.learning_rate

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of a finished run."""
        return json.loads((self.folder / SUMMARY).read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its metrics.jsonl."""
        return read_rows(self.folder / "metrics.jsonl")

    def evaluation(self, step: int | None = None) -> dict[str, Any]:
        """The evaluation row of a step, such as 0 for the untrained model; the last one where None."""
        found = [row for row in self.rows if "eval_loss" in row and step in (None, row["step"])]
        return found[-1]


class Study:
    """The comparison that `config` describes, in the folder `out`; `mode` is a key of SEEDS."""

    def __init__(self, config: Config, out: Path, mode: str):
        self.config, self.out, self.mode = config, out, mode
        self.seeds = [config.seed + index for index in range(SEEDS[mode])]
        self.methods = distinct(MAIN + ABLATIONS if mode == "ablations" else MAIN, config)
        self.rates = [factor * config.optim.learning_rate for factor in GRID]

    def record(self) -> dict[str, Any]:
        """What makes this study what it is: a folder is continued only by the same."""
        config = dataclasses.replace(self.config, output_dir="")
        return json.loads(json.dumps({"mode": self.mode, "grid": GRID, **to_dict(config)}))

    def searches(self, method: Method) -> list[Run]:
        """Short runs at every learning rate of the grid, evaluated on the validation rows."""
        return [self._run(method, f"search/{method.name}-{rate:g}", self.seeds[0], rate) for rate in self.rates]

    def finals(self, method: Method, rate: float) -> list[Run]:
        """Whole runs with every seed, evaluated on the test rows."""
        return [self._run(method, f"runs/{method.name}-seed{seed}", seed, rate) for seed in self.seeds]

    def _run(self, method: Method, folder: str, seed: int, rate: float) -> Run:
        config, data = method.change(self.config), self.config.data
        length = LENGTHS[self.mode]
        if folder.startswith("search"):
            data = dataclasses.replace(data, exact_match=False, samples=0)
            length = SEARCH_LENGTHS[self.mode]
        else:
            data = dataclasses.replace(data, eval=data.test, eval_split=data.test_split)
        train = dataclasses.replace(shortened(config.train, length), eval_every=0, keep=1, keep_best=False)
        model = config.model
        if method.base_format:
            model = dataclasses.replace(model, path=str(self.out / "bases" / method.base_format))
        optim = dataclasses.replace(config.optim, learning_rate=rate)
        changed: dict[str, Any] = dict(model=model, data=data, optim=optim, train=train)
        return Run(
            method=method,
            config=dataclasses.replace(config, seed=seed, output_dir=str(self.out / folder), **changed),
        )


def shortened(section: TrainSection, share: float) -> TrainSection:
    """The train section of a run that is this share as long."""
    if section.steps is not None:
        return dataclasses.replace(section, steps=max(round(section.steps * share), 1))
    return dataclasses.replace(section, epochs=(section.epochs or 1) * share)


def check_study(study: Study) -> None:
    """Refuses what cannot be compared, and a folder that holds something else. Writes nothing.

    Raises:
      ValueError: with what is missing or in the way.
    """
    data = study.config.data
    for name, purpose in (("eval", "to choose learning rates on"), ("test", "to measure the methods on")):
        if not isinstance(getattr(data, name), str) or not getattr(data, name):
            raise ValueError(
                f"config.data.{name}={getattr(data, name)!r}: a comparison needs rows {purpose}; "
                f"name them with --config.data.{name}=FILE"
            )
    if data.eval == data.test and not (Path(data.test).is_dir() and data.eval_split != data.test_split):
        raise ValueError(
            f"config.data.eval and config.data.test are both {data.test!r}: learning rates are chosen on the first, so "
            "the second must be other rows"
        )
    if study.config.model.weights != "checkpoint":
        raise ValueError(
            f"config.model.weights={study.config.model.weights!r}: a comparison starts from a trained base; "
            "use config.model.weights=checkpoint"
        )
    check_folder(study)


def check_files(config: Config) -> Config:
    """Reads the base's geometry and the test rows, which no run would ask for before the first one is at its end.

    Returns:
      The configuration as the base can have it by every method.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: one of them is not there, or is not what it should be.
    """
    model_config = read_config(resolve_folder(config.model.path))
    load_rows(config.data.test, config.data.test_split)
    packed = for_geometry(with_method(config, "qlora"), model_config)
    return dataclasses.replace(config, model=packed.model, quant=packed.quant)


def check_folder(study: Study) -> None:
    """Refuses an `out` that holds anything but this study. Raises ValueError."""
    out, record = study.out, study.out / RECORD
    if record.exists():
        known, now = json.loads(record.read_text()), study.record()
        changed = next((key for key in now if known.get(key) != now[key]), None)
        if changed:
            raise ValueError(
                f"{out} holds another comparison ({changed} was {known.get(changed)!r}, now {now[changed]!r}): choose "
                "another --out, or delete that folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty and holds no comparison: choose another folder")


def start_study(study: Study) -> None:
    """Creates the folder, its record, and the bases that are rounded to other formats."""
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / RECORD).write_text(json.dumps(study.record(), indent=2) + "\n")
    for form in {method.base_format for method in study.methods if method.base_format}:
        folder = study.out / "bases" / form
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write_rounded(resolve_folder(study.config.model.path), folder, form)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method's runs gave: the validation loss at each rate tried (inf: it diverged), and the whole runs."""

    method: Method
    search: dict[float, float]
    runs: list[Run]

    @property
    def rate(self) -> float:
        return self.runs[0].rate
