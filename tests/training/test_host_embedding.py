"""model.embedding=host: the same numbers, from a table that never reaches the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import LoraSection, Pieces, QuantSection
from qlora_jax.data import Batch
from qlora_jax.generation import Generator
from qlora_jax.io.build import abstract_model
from qlora_jax.io.hf import random_model
from qlora_jax.models.adapters import add_adapters
from qlora_jax.objective import SFT
from qlora_jax.quant.host_table import HostTable, host_table, with_table_on_device
from qlora_jax.quant.rules import AS_HELD, packed
from qlora_jax.training.batch import to_device
from qlora_jax.training.offload import init_state
from qlora_jax.training.offload_step import make_paged_step
from qlora_jax.training.step import evaluate, make_eval_step, make_train_step, split_model
from tests.training.test_step import CONFIG, make_batch

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def make_parts(host: bool):
    model = random_model(UNTIED, 0, dtype="float32", rules=packed(QuantSection()), host_embedding=host).model
    add_adapters(model, LoraSection(rank=4), jax.random.key(1))
    return split_model(model)


def batch(seed=0) -> Batch:
    return {name: np.asarray(array) for name, array in make_batch(seed=seed).items()}


def trained(host: bool, paged: bool = False):
    """(adapters after three steps, their losses, loss of an evaluation)."""
    parts, objective, pieces = make_parts(host), SFT(), Pieces(loss_chunk=16)
    optimizer = optax.adamw(1e-2)
    if paged:
        step = make_paged_step(parts.graphdef, optimizer, objective, pieces)
        state = init_state(optimizer, parts.trained)
    else:
        step = make_train_step(parts.graphdef, optimizer, objective, pieces)
        state = optimizer.init(parts.trained)
    adapters, losses = parts.trained, []
    for seed in range(3):
        arrays = to_device(batch(seed), objective.arrays, parts.base)
        adapters, state, metrics = step(adapters, state, parts.base, arrays, None)
        losses.append(float(metrics["loss"]))
    after = parts._replace(trained=adapters)
    return adapters, losses, evaluate(make_eval_step(parts.graphdef, objective, pieces), after, [batch(9)])


@pytest.mark.parametrize("paged", [False, True])
def test_training_is_the_same_to_the_bit(paged):
    here, there = trained(False, paged), trained(True, paged)
    jax.tree.map(np.testing.assert_array_equal, here[0], there[0])
    assert here[1:] == there[1:] and len(set(here[1])) == 3


def test_the_table_is_no_data_to_jax():
    here, there = make_parts(False), make_parts(True)
    table = host_table(there.base)
    assert isinstance(table.array, np.ndarray) and table.nbytes == 97 * UNTIED.hidden_size * 4
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(parts.base)) for parts in (here, there)]
    assert sizes[0] - sizes[1] == table.nbytes
    assert host_table(here.base) is None
    back = with_table_on_device(there.base)
    jax.tree.map(np.testing.assert_array_equal, back, here.base)


def test_only_the_rows_of_a_step_are_sent():
    sent = to_device(batch(), SFT.arrays, make_parts(True).base)
    assert sent["embedded"].shape == (*sent["tokens"].shape, UNTIED.hidden_size)
    assert to_device(batch(), SFT.arrays, make_parts(False).base).get("embedded") is None


def test_generating_with_the_table_back_on_the_device():
    answers = []
    for parts in (make_parts(False), make_parts(True)):
        generator = Generator(parts.graphdef, parts.trained, with_table_on_device(parts.base), stop_ids=())
        answers.append(generator.generate([[3, 5, 7]], max_new_tokens=5))
    assert answers[0] == answers[1]


def test_looking_up_on_the_device_what_is_not_there_says_so():
    parts = make_parts(True)
    with pytest.raises(TypeError, match=r"stays in host memory.*embedded"):
        parts.merge()(jnp.zeros((1, 4), jnp.int32))


def test_an_abstract_model_has_the_same_structure():
    abstract = abstract_model(UNTIED, dtype="float32", rules=packed(QuantSection()), host_embedding=True)
    table = abstract.embed_tokens.weight.get_value()
    assert isinstance(table, HostTable) and table.nbytes == 97 * UNTIED.hidden_size * 4
    assert table.rows_shape((2, 3)) == jax.ShapeDtypeStruct((2, 3, UNTIED.hidden_size), jnp.float32)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (AS_HELD, "model.embedding='host': .*output layer is its embedding.*: set model.embedding='device'$"),
        (
            packed(QuantSection(lm_head="int8")),
            "model.embedding='host' and quant.lm_head='int8': .*='device' and quant.embedding='int8'",
        ),
    ],
)
def test_a_tied_embedding_is_refused_with_all_that_must_change(rules, words):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match=words):
        random_model(tied, 0, dtype="float32", rules=rules, host_embedding=True)
