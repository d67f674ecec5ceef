"""Drawing with a Sampling for each row is drawing each row by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generation.sampling import RowSampling, Sampling, _truncated, sample, sample_rows

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.8),
    Sampling(temperature=2.0, top_k=9, top_p=0.5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=1e-6),
]


def rows_of(samplings) -> RowSampling:
    return RowSampling(
        jnp.asarray([s.temperature for s in samplings]),
        jnp.asarray([s.top_k for s in samplings]),
        jnp.asarray([s.top_p for s in samplings]),
    )


@pytest.mark.parametrize(
    "samplings", [SAMPLINGS, SAMPLINGS[:2], SAMPLINGS[:1]], ids=["truncated", "whole vocabulary", "greedy"]
)
def test_rows_draw_what_they_draw_alone(samplings):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (len(samplings), 50)), jnp.float32)
    drawn = jax.jit(sample_rows)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(samplings))
        alone = [int(sample(logits[i : i + 1], keys[i], s)[0]) for i, s in enumerate(samplings)]
        assert drawn(logits, keys, rows_of(samplings)).tolist() == alone


def test_top_k_and_top_p_leave_the_tokens_they_should():
    """Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled places."""
    probabilities = np.asarray([0.2, 0.4, 0.1, 0.3], np.float32)
    cases = {(2, 1.0): {1, 3}, (0, 0.71): {0, 1, 3}, (0, 0.69): {1, 3}, (3, 0.5): {1, 3}, (0, 1.0): {0, 1, 2, 3}}
    keys = jax.random.split(jax.random.key(0), 400)
    logits = jnp.broadcast_to(jnp.log(probabilities), (400, 4))
    for (top_k, top_p), left in cases.items():
        rows = rows_of([Sampling(temperature=1.0, top_k=top_k, top_p=top_p)] * 400)
        assert set(sample_rows(logits, keys, rows).tolist()) == left


@pytest.mark.parametrize("kept", range(1, 9))
def test_a_set_that_reaches_p_just_so_is_whole(kept):
    """Eight tokens of exactly 1/8 each: p = k/8 is reached by k of them, in transformers too."""
    logits = np.zeros((1, 8), np.float32)
    ours = _truncated(jnp.asarray(logits), jnp.zeros(1, jnp.int32), jnp.asarray([kept / 8]))
    theirs = warped(logits, top_k=0, top_p=kept / 8)
    assert np.isfinite(ours).sum() == np.isfinite(theirs).sum() == kept


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_what_is_left_is_what_transformers_leaves(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (20, 50)).astype(np.float32)
    rows = len(logits)
    ours = _truncated(jnp.asarray(logits), jnp.full(rows, top_k), jnp.full(rows, top_p, jnp.float32))
    np.testing.assert_array_equal(ours, warped(logits, top_k=top_k, top_p=top_p))


def warped(logits: np.ndarray, *, top_k: int, top_p: float) -> np.ndarray:
    """What transformers draws from, of float32 `[B, V]`: the same, with -inf for what cannot be drawn."""
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(logits.copy())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    return (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).numpy()
