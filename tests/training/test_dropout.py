"""Every place that drops inputs draws a mask of its own: in each step, microbatch, layer, projection and chunk."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import Config, LoraSection, Pieces
from qlora_jax.lora import low_rank
from qlora_jax.objective import SFT
from qlora_jax.training.loop import Loop
from qlora_jax.training.step import make_train_step
from tests.training.test_step import make_batch, make_parts

ACCUM, LAYERS, LENGTH = 3, 2, 24
ATTENTION, MLP = 4, 3  # projections of a layer


@pytest.fixture
def drawn(monkeypatch):
    """The key of every mask that is drawn, in no order."""
    keys: list[tuple[int, ...]] = []
    whole = jax.random.bernoulli

    def watched(key, p, shape):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return whole(key, p, shape)

    monkeypatch.setattr(low_rank.jax.random, "bernoulli", watched)
    return keys


def run_step(key, **options) -> None:
    parts = make_parts(dropout=0.5, layers=LAYERS, targets=options.pop("targets", "all-linear"))
    optimizer = optax.sgd(1.0)
    step = make_train_step(parts.graphdef, optimizer, SFT(), Pieces(loss_chunk=16, **{"remat": "none", **options}))
    adapters = jax.tree.map(jnp.copy, parts.trained)
    batch = make_batch(accum=ACCUM, length=LENGTH)
    jax.block_until_ready(step(adapters, optimizer.init(adapters), parts.base, batch, key))
    jax.effects_barrier()


def test_no_two_masks_of_a_step_have_one_key(drawn):
    run_step(jax.random.key(0), mlp_chunk=LENGTH // 2)
    # The chunks of an MLP are computed again in the backward pass, with the keys that they had.
    assert len(set(drawn)) == ACCUM * LAYERS * (ATTENTION + 2 * MLP)
    assert set(np.unique(drawn, axis=0, return_counts=True)[1]) == {1, 2}


def test_a_backward_pass_that_computes_again_draws_the_same_masks(drawn):
    run_step(jax.random.key(0), remat="full", targets=("q_proj", "down_proj"))
    assert len(set(drawn)) == ACCUM * LAYERS * 2
    assert set(np.unique(drawn, axis=0, return_counts=True)[1]) == {2}


def test_every_step_of_a_run_has_its_own_key_and_a_second_start_the_same():
    def keys(**settings) -> list:
        config = Config(lora=LoraSection(dropout=0.1), **settings)
        loop = SimpleNamespace(trainer=SimpleNamespace(config=config))
        return [tuple(jax.random.key_data(Loop._key(loop, step)).tolist()) for step in range(20)]

    assert len({*keys(), *keys(seed=1)}) == 40
    assert keys() == keys()
