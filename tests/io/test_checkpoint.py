import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import OptimSection
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.lora.partition import make_optimizer
from qlora_jax.training.optimizer import adamw

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}


def write(folder, losses, **options):
    """A checkpoint per entry of `losses`; None stands for a step without an evaluation."""
    checkpoints = Checkpoints(folder, **{"keep": 2, "keep_best": True, **options})
    state = optax.adam(1e-3).init(PARAMS)
    for step, loss in enumerate(losses, start=1):
        adapters = {name: value + step for name, value in PARAMS.items()}
        metrics = None if loss is None else {"eval_loss": loss}
        checkpoints.save(step, adapters, state, {"base_hash": "x", "step": step}, metrics)
        checkpoints.wait()
    return checkpoints, state


def test_a_restored_state_has_the_same_bits(tmp_path):
    checkpoints, state = write(tmp_path, [3.0])
    restored = checkpoints.restore(1, adapters=PARAMS, optimizer=state)
    for name, value in PARAMS.items():
        assert restored["adapters"][name].dtype == value.dtype
        np.testing.assert_array_equal(restored["adapters"][name], value + 1)
    assert type(restored["optimizer"]) is type(state)
    assert checkpoints.meta(1) == {"base_hash": "x", "step": 1}


@pytest.mark.parametrize(
    ("options", "kept", "best"),
    [({}, [2, 4, 5], 2), (dict(keep_best=False), [4, 5], 4), (dict(keep=1), [2, 5], 2)],
)
def test_the_latest_and_the_best_are_kept(tmp_path, options, kept, best):
    checkpoints, _ = write(tmp_path, [3.0, 1.0, None, 2.0, None], **options)
    assert checkpoints.steps == kept == Checkpoints.steps_in(tmp_path)
    assert checkpoints.best == best


def test_without_an_evaluation_there_is_no_best(tmp_path):
    checkpoints, _ = write(tmp_path, [None])
    with pytest.raises(ValueError, match="no checkpoint of this run was evaluated"):
        _ = checkpoints.best


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_is_never_the_best(tmp_path, bad, place):
    """Earlier versions saved evaluations that were NaN."""
    losses = [3.0, 2.0]
    losses.insert(place, bad)
    checkpoints, _ = write(tmp_path, [*losses, None], keep=1)
    assert checkpoints.best == losses.index(2.0) + 1
    assert checkpoints.steps == [checkpoints.best, 4]


def test_without_a_finite_evaluation_there_is_no_best(tmp_path):
    checkpoints, _ = write(tmp_path, [math.nan, math.inf])
    with pytest.raises(ValueError, match="no checkpoint of this run has a finite eval_loss"):
        _ = checkpoints.best


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_an_optimizers_state_of_an_earlier_version_is_found(tmp_path, moments, clip):
    """It covered (trained, frozen), masked: the same leaves, under longer paths."""
    tx = adamw(OptimSection(moments=moments, clip=clip), optax.linear_schedule(1e-3, 0, 10))
    trained = {"layers": {"A": jnp.zeros((2, 3)), "B": jnp.zeros((2, 1))}, "norm": [jnp.zeros(4)]}
    masks = jax.tree.map(lambda _: True, trained), jax.tree.map(lambda _: False, PARAMS)
    earlier = make_optimizer(tx, masks).init((trained, PARAMS))
    numbers = itertools.count(1)
    earlier = jax.tree.map(lambda leaf: jnp.full_like(leaf, next(numbers)), earlier)
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=False)
    checkpoints.save(1, trained, earlier, {})
    checkpoints.wait()
    state = tx.init(trained)
    restored = checkpoints.restore(1, optimizer=state)["optimizer"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for name in ("mu", "nu"):
        expected, _ = optax.tree.get(earlier, name)
        jax.tree.map(np.testing.assert_array_equal, optax.tree.get(restored, name), expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert len({float(leaf.ravel()[0]) for leaf in jax.tree.leaves(restored)}) == len(jax.tree.leaves(state))
    checkpoints.close()
