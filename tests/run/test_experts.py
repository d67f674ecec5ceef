"""QLoRA on the experts of a mixture: trained, counted, stopped and continued."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax import Config, DataSection, LoraSection, ModelSection, OptimSection, TrainSection, train
from qlora_jax.io.peft import read_adapter
from tests.cli.tiny import write_rows
from tests.families.conftest import checkpoint as family  # noqa: F401

pytest.importorskip("transformers")
TARGETS = ("q_proj", "experts.gate_up_proj", "experts.down_proj")


@pytest.fixture
def config_of(family, tmp_path):  # noqa: F811
    write_rows(tmp_path / "rows.jsonl")

    def make(name: str, **train) -> Config:
        sizes = {"steps": 3, "batch_size": 2, "grad_accum": 2, "seq_len": 32, "save_every": 1, "eval_every": 0}
        return Config(
            output_dir=str(tmp_path / name),
            model=ModelSection(path=str(family("qwen3_moe")), dtype="fp32"),
            lora=LoraSection(rank=2, targets=TARGETS),
            data=DataSection(train=str(tmp_path / "rows.jsonl"), samples=0),
            optim=OptimSection(learning_rate=1e-2),
            train=TrainSection(**{**sizes, **train}),
        )

    return make


def test_a_run_on_experts_goes_on_bit_for_bit(config_of):
    whole = train(config_of("whole"))
    # Three layers: q_proj 2·(128 + 64); eight experts with 2·(128 + 64) for gate and up, and 2·(64 + 64) for down.
    assert whole.summary["trainable"] == 3 * (2 * 192 + 8 * 2 * (192 + 128))
    losses = [row["loss"] for row in whole.rows if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]

    train(config_of("stopped", steps=2))
    continued = train(config_of("stopped"))
    files = [load_file(run.adapter / "adapter_model.safetensors") for run in (whole, continued)]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        np.testing.assert_array_equal(files[0][name], files[1][name])
    pair = read_adapter(whole.adapter).weights["model.layers.2.mlp.experts.down_proj"]
    assert pair.A.shape == (8, 2, 64) and np.abs(pair.B).max(axis=(1, 2)).min() > 0
    assert len(jax.tree.leaves(read_adapter(whole.adapter).weights)) == 3 * 3 * 2
