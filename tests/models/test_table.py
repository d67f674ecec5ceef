"""The table of parameters: what it says of a small model, and checkpoints that keep arrays in other ways."""

import dataclasses
import math

import numpy as np

from qlora_jax.models.names import Names
from qlora_jax.models.params import Axis, Cut, Param, Piece, Tensor
from qlora_jax.models.table import checkpoint, count_parameters, joined, table, tensors
from tests.tiny_config import CONFIG


def test_what_the_table_says_of_a_projection():
    assert table(CONFIG)["layers.mlp.down_proj.weight"] == Param(
        path="layers.mlp.down_proj.weight",
        shape=(64, 128),
        axes=("embed", "mlp"),
        role="projection",
        name="model.layers.{layer}.mlp.down_proj.weight",
        stacked=(Axis("layer", range(3)),),
        pieces=(Piece("model.layers.{layer}.mlp.down_proj.weight"),),
    )


def test_every_tensor_stands_in_a_checkpoint_once():
    found = list(tensors(CONFIG))
    assert len(found) == len({tensor.name for tensor in found}) == 3 + 9 * CONFIG.num_layers
    assert sum(math.prod(tensor.param.shape) for tensor in found) == count_parameters(CONFIG)


def test_modules_and_files_have_names_of_their_own():
    names = Names("model.language_model", files=(("model.language_model.", "language_model.model."), ("mlp.", "ffn.")))
    config = dataclasses.replace(CONFIG, names=names)
    [tensor] = [one for one in tensors(config) if one.param.path.endswith("up_proj.weight") and one.place == (2,)]
    assert tensor.module == "model.language_model.layers.2.mlp.up_proj"
    assert [part.name for part in tensor.parts] == ["language_model.model.layers.2.ffn.up_proj.weight"]
    assert names.embedding == "language_model.model.embed_tokens.weight"


def experts(*pieces: Piece) -> Param:
    return Param(
        path="layers.mlp.experts.gate_up_proj.weight",
        shape=(6, 8),
        axes=("mlp", "embed"),
        role="expert",
        name="model.layers.{layer}.mlp.experts.gate_up_proj.weight",
        stacked=(Axis("layer", range(1, 6, 2)), Axis("expert", range(4))),
        pieces=pieces,
    )


def test_an_array_of_two_tensors():
    each = "model.layers.{layer}.mlp.experts.{expert}."
    param = experts(Piece(f"{each}gate_proj.weight", (0, 3)), Piece(f"{each}up_proj.weight", (3, 6)))
    assert param.leading == (3, 4)
    last = list(param.tensors())[-1]
    assert [part.name for part in last.parts] == [
        "model.layers.5.mlp.experts.3.gate_proj.weight",
        "model.layers.5.mlp.experts.3.up_proj.weight",
    ]
    assert [part.whole for part in last.parts] == [(3, 8)] * 2
    whole = np.arange(48).reshape(6, 8)
    np.testing.assert_array_equal(last.gathered(lambda part: whole[part.rows]), whole)


def test_one_tensor_of_all_experts_that_keeps_inputs_first():
    param = experts(Piece("model.layers.{layer}.mlp.experts.gate_up_proj", cut=Cut((4, 8, 6), transposed=True)))
    parts = [part for place in range(4) for part in Tensor(param, (0, place)).parts]
    assert {part.name for part in parts} == {"model.layers.1.mlp.experts.gate_up_proj"}
    whole = np.arange(4 * 8 * 6).reshape(4, 8, 6)
    values = [part.of(whole) for part in parts]
    np.testing.assert_array_equal(values[2], whole[2].T)
    np.testing.assert_array_equal(joined(parts, values), whole)


def test_a_checkpoint_by_its_names():
    parts = checkpoint(CONFIG)["model.layers.1.self_attn.q_proj.weight"]
    assert [(part.tensor.param.path, part.tensor.place) for part in parts] == [("layers.self_attn.q_proj.weight", (1,))]
