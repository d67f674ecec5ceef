"""An objective decides what a step lowers: here one that compares texts, on the same model, steps and pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.config import Config, Pieces
from qlora_jax.objective import SFT, Measured, hidden_states, objective_of
from qlora_jax.objective.objective import MODEL_ARRAYS
from qlora_jax.objective.tokens import token_log_probs
from qlora_jax.training.batch import to_device
from qlora_jax.training.offload import init_state
from qlora_jax.training.offload_step import make_paged_step
from qlora_jax.training.step import evaluate, make_eval_step, make_train_step
from tests.training.test_step import make_batch, make_parts

PIECES = Pieces(loss_chunk=5, vocab_chunk=32, mlp_chunk=7)
BETA = 0.01  # how much a difference of the texts counts


class Preference:
    """Of every two rows the first is to be likelier than the second."""

    arrays = (*MODEL_ARRAYS, "scored")

    def zeros(self):
        return {"loss": jnp.float32(0), "right": jnp.int32(0), "pairs": jnp.int32(0)}

    def measure(self, model, batch, pieces, key=None):
        slices = pieces.vocab_slices(model.config.vocab_size)
        hidden = hidden_states(model, batch, pieces, key)
        found = token_log_probs(hidden, batch["tokens"], model.logits, chunk=pieces.loss_chunk, slices=slices)
        texts = jnp.sum(found * batch["scored"][:, 1:], axis=1)
        return compared(BETA * (texts[0::2] - texts[1::2]))

    def weight(self, sums):
        return sums["pairs"]

    def metrics(self, sums):
        return {"loss": sums["loss"] / sums["pairs"], "accuracy": sums["right"] / sums["pairs"]}


def compared(margins) -> Measured:
    total = -jnp.sum(jax.nn.log_sigmoid(margins))
    right = jnp.sum(margins > 0, dtype=jnp.int32)
    return Measured(total, {"loss": total, "right": right, "pairs": jnp.int32(margins.size)})


def direct(parts, batch, trained):
    """The same mean over all pairs, from the whole logits."""
    model = nnx.merge(parts.graphdef, trained, parts.base)
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    scores = jax.nn.log_softmax(model(flat["tokens"], flat["positions"], flat["segment_ids"])[:, :-1])
    found = jnp.take_along_axis(scores, flat["tokens"][:, 1:, None], -1)[..., 0]
    texts = jnp.sum(found * flat["scored"][:, 1:], axis=1)
    return jnp.mean(-jax.nn.log_sigmoid(BETA * (texts[0::2] - texts[1::2])))


@functools.cache
def stepped(paged: bool):
    """(parts, the batch, what is trained after a step, its metrics)."""
    parts, batch, tx = make_parts(), make_batch(accum=2, rows=4), optax.sgd(1.0)
    make, init = (make_paged_step, init_state) if paged else (make_train_step, lambda tx, trained: tx.init(trained))
    step = make(parts.graphdef, tx, Preference(), PIECES)
    trained = jax.tree.map(jnp.copy, parts.trained)
    trained, _, metrics = step(trained, init(tx, trained), parts.base, batch, None)
    return parts, batch, trained, metrics


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_follows_the_gradient_of_its_objective(paged):
    parts, batch, trained, metrics = stepped(paged)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}
    loss, grads = jax.value_and_grad(functools.partial(direct, parts, batch))(parts.trained)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    expected = jax.tree.map(jnp.subtract, parts.trained, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), trained, expected)


def test_an_evaluation_adds_up_over_its_batches():
    parts, batch, _, metrics = stepped(False)
    step = make_eval_step(parts.graphdef, Preference(), PIECES)
    single = [{name: np.asarray(array[i : i + 1]) for name, array in batch.items()} for i in range(2)]
    found = evaluate(step, parts, single)
    assert found.keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    assert found["accuracy"] == metrics["accuracy"]


def test_only_the_arrays_that_it_names_are_sent():
    batch = {name: np.asarray(array) for name, array in make_batch().items()} | {"weights": np.ones(3)}
    assert to_device(batch, SFT.arrays, make_parts().base).keys() == {"tokens", "segment_ids", "positions", "scored"}


def test_sft_of_numbers_and_of_arrays():
    """In double precision where an evaluation adds up, and without a division by zero where nothing is scored."""
    assert SFT().metrics({"loss": 1e9 + 1.0, "tokens": 4}) == {"loss": (1e9 + 1.0) / 4, "tokens": 4}
    nothing = SFT().metrics(SFT().zeros())
    assert (float(nothing["loss"]), int(nothing["tokens"])) == (0, 0)
    assert isinstance(objective_of(Config()), SFT)


def test_no_logits_of_all_tokens_exist_where_each_tokens_log_probability_is_asked_for():
    vocab, tokens = 4096, jnp.zeros((1, 2048), jnp.int32)
    head, hidden = jnp.zeros((vocab, 16)), jnp.zeros((1, 2048, 16))

    def loss(hidden):
        found = token_log_probs(hidden, tokens, lambda h: h @ head.T, chunk=64)
        assert found.shape == (1, 2047)
        return jax.nn.sigmoid(found.sum())

    memory = jax.jit(jax.value_and_grad(loss)).lower(hidden).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.25 * 2048 * vocab * 4
