"""A comparison whose runs are not trained: they only leave what training leaves."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_jax.compare.study import Outcome, Study
from qlora_jax.config import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    TrainSection,
    to_dict,
)
from qlora_jax.run import compare
from qlora_jax.run.train_result import TrainResult
from qlora_jax.training.loop import Diverged
from qlora_jax.training.observer import Observer

CONFIG = Config(
    seed=7,
    model=ModelSection(path="base", dtype="fp32"),
    lora=LoraSection(rank=16, alpha=32, targets="all-linear"),
    data=DataSection(train="train.jsonl", eval="validation.jsonl", test="test.jsonl", exact_match=True),
    optim=OptimSection(learning_rate=1e-2),
    train=TrainSection(steps=40, batch_size=4, grad_accum=1),
)
# Held-out loss after training; a seed adds a hundredth for each number above 7.
LOSSES = {"full": 1.0, "lora": 1.1, "qlora": 1.2}
TRAINED = {"full": 1000, "lora": 64, "qlora": 64}


class Trainer:
    """Stands in for training: notes what it is asked for, and writes a run's folder."""

    def __init__(self, *, diverges=(), stops_at=None):
        self.asked: list[Config] = []
        self.diverges, self.stops_at = diverges, stops_at

    def __call__(self, config: Config, *, progress: Observer) -> TrainResult:
        self.asked.append(config)
        if len(self.asked) == self.stops_at:
            return TrainResult(folder=Path(config.output_dir), stopped=signal.SIGTERM)
        rate, search = config.optim.learning_rate, "/search/" in config.output_dir
        if (config.method, rate) in self.diverges:
            raise Diverged("loss nan")
        # Short runs are best at 0.003 in full and at 0.01 with adapters.
        best = 0.003 if config.method == "full" else 0.01
        loss = abs(rate - best) if search else LOSSES[config.method] + 0.01 * (config.seed - 7)
        write_run(Path(config.output_dir), config, loss)
        return TrainResult(folder=Path(config.output_dir))


def write_run(folder: Path, config: Config, loss: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    match = {"exact_match": 0.75} if config.data.exact_match else {}
    rows = [{"step": 0, "eval_loss": 5.0, **(match and {"exact_match": 0.25})}]
    rows += [{"step": s, "loss": 4.0 / s, "tokens_per_second": 100.0 * s} for s in (1, 2, 3)]
    rows += [{"step": 3, "eval_loss": loss, **match}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"trainable": TRAINED[config.method], "parameters": 1000, "compiled_bytes": 8_000_000}
    (folder / "summary.json").write_text(json.dumps(summary | {"device_peak_bytes": None}))


def outcomes(study: Study, train: Trainer) -> Iterator[Outcome]:
    """The outcomes of a study whose runs are trained by `train`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", train)
        yield from compare.outcomes(study, Observer())
