"""The table of parameters: what it says of a small model, and checkpoints that fuse several layers into one."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.build import build_model, random_read
from qlora_jax.io.save import write_model
from qlora_jax.models.table import Axis, Cut, Param, checkpoint, count_parameters, joined, table, tensors
from tests.tiny_config import CONFIG

FUSED = dataclasses.replace(
    CONFIG,
    qkv_bias=True,
    fused=(
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
)


def test_what_the_table_says_of_a_projection():
    assert table(CONFIG)["layers.mlp.down_proj.weight"] == Param(
        path="layers.mlp.down_proj.weight",
        shape=(64, 128),
        axes=("embed", "mlp"),
        role="projection",
        name="model.layers.{layer}.mlp.down_proj.weight",
        stacked=(Axis("layer", range(3)),),
    )


def test_every_tensor_stands_in_a_checkpoint_once():
    found = list(tensors(CONFIG))
    assert len(found) == len({tensor.name for tensor in found}) == 3 + 9 * CONFIG.num_layers
    assert sum(math.prod(tensor.param.shape) for tensor in found) == count_parameters(CONFIG)


def test_a_fused_tensor_is_cut_and_joined():
    q, k, v = checkpoint(FUSED)["model.layers.1.self_attn.qkv_proj.weight"]
    assert [part.param.path for part in (q, k, v)] == [f"layers.self_attn.{p}_proj.weight" for p in "qkv"]
    assert q.whole == k.whole == (64 + 32 + 32, 64)
    whole = np.arange(math.prod(q.whole), dtype=np.float32).reshape(q.whole)
    np.testing.assert_array_equal(k.part_of(whole), whole[64:96])
    np.testing.assert_array_equal(joined([q, k, v], [part.part_of(whole) for part in (q, k, v)]), whole)
    biases = checkpoint(FUSED)["model.layers.1.self_attn.qkv_proj.bias"]
    assert [part.param.cut.rows for part in biases] == [(0, 64, 1), (64, 96, 1), (96, 128, 1)]


def test_experts_of_one_tensor_that_keeps_inputs_first_and_two_layers_row_by_row():
    cut = Cut(whole=(4, 8, 6), rows=(1, 6, 2), by_expert=True, transposed=True)
    whole = np.arange(4 * 8 * 6).reshape(cut.whole)
    np.testing.assert_array_equal(cut.of(whole, 2), whole[2].T[1::2])
    written = np.zeros_like(whole)
    cut.of(written, 2)[...] = cut.of(whole, 2)
    assert (written[2][:, 1::2] == whole[2][:, 1::2]).all() and not written[[0, 1, 3]].any()
    experts = Param(
        path="layers.mlp.up",
        shape=(3, 8),
        axes=("mlp", "embed"),
        role="projection",
        name="model.layers.{layer}.mlp.experts.{expert}.up",
        stacked=(Axis("layer", range(1, 6, 2)), Axis("expert", range(2))),
    )
    assert experts.leading == (3, 2)
    assert [tensor.name for tensor in experts.tensors()][-1] == "model.layers.5.mlp.experts.1.up"


@pytest.fixture
def fused_checkpoint(tmp_path):
    """The tensors of a fused checkpoint, as a full fine-tune of FUSED writes them."""
    model = build_model(FUSED, random_read(FUSED, 3), dtype="float32")
    write_model(model, tmp_path / "fused", None)
    return model, tmp_path / "fused"


def test_a_fused_checkpoint_is_written_and_read(fused_checkpoint):
    from safetensors.numpy import load_file

    model, folder = fused_checkpoint
    written = load_file(folder / "model.safetensors")
    assert written.keys() == checkpoint(FUSED).keys()
    assert written["model.layers.0.mlp.gate_up_proj.weight"].shape == (2 * FUSED.intermediate_size, FUSED.hidden_size)
    again = build_model(FUSED, lambda tensor: tensor.part_of(written[tensor.name]), dtype="float32")
    tokens = jnp.asarray([[1, 5, 9, 2]])
    np.testing.assert_array_equal(again(tokens), model(tokens))
