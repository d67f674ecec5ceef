from pathlib import Path

import pytest

from qlora_jax import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection, train
from qlora_jax.run.train_result import TrainResult
from tests.cli.tiny import make_model, write_rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """With a model, `model`, and rows, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("library")
    make_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="session")
def make_config(folder):
    """`make_config(output_dir, **train)`: three steps in fp32."""

    def make(output_dir: Path, **train) -> Config:
        sizes = {"steps": 3, "batch_size": 2, "grad_accum": 2, "seq_len": 32, "save_every": 1, "eval_every": 2}
        return Config(
            output_dir=str(output_dir),
            model=ModelSection(path=str(folder / "model"), dtype="fp32"),
            lora=LoraSection(rank=4),
            data=DataSection(train=str(folder / "rows.jsonl"), eval=0.25, samples=1),
            optim=OptimSection(learning_rate=1e-2),
            train=TrainSection(**{**sizes, **train}),
        )

    return make


@pytest.fixture(scope="session")
def trained(folder, make_config) -> TrainResult:
    """A finished run."""
    return train(make_config(folder / "run"))
