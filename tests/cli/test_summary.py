"""What a finished run leaves for programs, and its report's memory."""

import json

from qlora_jax.cli.train import main as train
from qlora_jax.config import load_config
from qlora_jax.io.hf import read_config
from qlora_jax.run.memory_bars import memory_bars
from tests.cli.commands import command, exit_code


def test_a_finished_run_has_a_summary(sound, run):
    summary = json.loads((sound / "run" / "summary.json").read_text())
    compiled, base = summary.pop("compiled_bytes"), summary.pop("base_hash")
    assert compiled > 100_000 and len(base) == 32
    # Rank 4 beside seven layers of two blocks: inputs and outputs of q and o, of k and v, and of the MLP's three.
    assert summary == {
        "method": "qlora",
        "steps": 3,
        "trainable": 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192),
        "parameters": 107_072,
        "device_peak_bytes": None,
        "device": "cpu",
        "platform": "cpu",
    }
    again = command(sound, run)
    assert exit_code(train, again) == 0  # complete already: the figures of its steps stay
    assert json.loads((run / "summary.json").read_text())["compiled_bytes"] == compiled


def test_memory_is_set_beside_the_other_methods(sound):
    config = load_config(sound / "config.py")
    chart = memory_bars(config, read_config(sound / "model"))
    assert [bar.name for bar in chart.bars] == ["full", "LoRA", "QLoRA (this run)"]
    assert [bar.chosen for bar in chart.bars] == [False, False, True]
    full, lora, qlora = chart.bars
    assert full.value == lora.value > qlora.value
    assert full.value + full.rest > lora.value + lora.rest
