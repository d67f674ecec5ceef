"""The plan's arithmetic beside XLA's own figures, for models of two layers with the sizes of a large one."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.cli.plan import main
from qlora_jax.config import Config, ModelSection, TrainSection, load_config
from qlora_jax.device.facts import device_bytes
from qlora_jax.io.hf import read_config
from qlora_jax.memory.compile import compile_for
from qlora_jax.memory.plan import plan
from qlora_jax.memory.train_step import abstract_train_step

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("cuda_wheels")

# Eight layers with the sizes of Qwen3.5-9B and LFM2-2.6B, and fewer tokens.
HYBRIDS = {
    "qwen3_5": dict(
        model_type="qwen3_5_text",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
    ),
    "lfm2": dict(
        model_type="lfm2",
        vocab_size=32_000,
        hidden_size=2560,
        intermediate_size=10_752,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        layer_types=["conv", "conv", "conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
    ),
}


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


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_a_unit_of_several_layers_is_within_a_tenth_of_the_compiled_peak(name, tmp_path):
    """Layers of a hybrid come back one after the other, and not all of a unit at once."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HYBRIDS[name]))
    config = Config(
        model=ModelSection(weights="random", geometry=str(file)), train=TrainSection(batch_size=1, seq_len=2048)
    )
    step, arguments = abstract_train_step(config)
    compiled = device_bytes(compile_for(step, arguments, "h200"))
    arithmetic = plan(config, read_config(file))
    assert arithmetic.arguments == compiled["arguments"]
    assert arithmetic.peak == pytest.approx(compiled["peak"], rel=0.1)


def test_the_command_compiles_the_chosen_method(two_layers, capsys):
    config = ["--config", str(ROOT / "configs" / "7b.py"), f"--config.model.geometry={two_layers('7b')}"]
    assert main([*config, "--gpu", "24GB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compiled"] and report["compiled_as"] == "a10"
    assert report["peak_bytes"] == pytest.approx(report["arithmetic_peak_bytes"], rel=0.1)
    assert report["fits"] and report["largest_batch"] > 1
