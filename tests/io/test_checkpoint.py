import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.io.checkpoint import Checkpoints

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
