"""The plan's arithmetic beside XLA's own figures, for models of two layers with the sizes of a large one."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.cli.plan import main
from qlora_jax.config import load_config
from qlora_jax.device.facts import device_bytes
from qlora_jax.io.hf import read_config
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.plan import plan
from qlora_jax.memory.train_step import abstract_train_step

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("cuda_wheels")


@pytest.fixture
def two_layers(tmp_path):
    """`two_layers(name)`: the geometry of a shipped config with two layers, in a file."""

    def write(name: str) -> Path:
        source = Path(load_config(ROOT / "configs" / f"{name}.py").model.geometry)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(json.loads(source.read_text()) | {"num_hidden_layers": 2}))
        return file

    return write


@pytest.mark.parametrize(
    ("name", "gpu", "overrides"),
    [
        ("8b", "rtx4090", ["train.batch_size=4"]),
        ("7b", "h200", ["train.seq_len=4096", "train.mlp_chunk=1024", "train.remat=offload"]),
        ("7b", "a100", ["method=lora", "train.remat=none", "train.batch_size=4"]),
        ("7b", "rtx5090", ["method=full", "train.batch_size=4"]),
    ],
)
def test_the_arithmetic_is_within_a_tenth_of_the_compiled_peak(name, gpu, overrides, two_layers):
    config = load_config(ROOT / "configs" / f"{name}.py", [f"--config.{one}" for one in overrides])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, geometry=str(two_layers(name))))
    step, arguments = abstract_train_step(config)
    compiled = device_bytes(compile_for(step, arguments, gpu))
    arithmetic = plan(config, read_config(Path(config.model.geometry)))
    assert arithmetic.arguments == compiled["arguments"]
    assert arithmetic.peak == pytest.approx(compiled["peak"], rel=0.1)


def test_the_command_compiles_the_chosen_method(two_layers, capsys):
    config = ["--config", str(ROOT / "configs" / "7b.py"), f"--config.model.geometry={two_layers('7b')}"]
    assert main([*config, "--gpu", "24GB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compiled"] and report["compiled_as"] == "a10"
    assert report["peak_bytes"] == pytest.approx(report["arithmetic_peak_bytes"], rel=0.1)
    assert report["fits"] and report["largest_batch"] > 1
