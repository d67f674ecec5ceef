"""Drawing with a Sampling for each row is drawing each row by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generate.sampling import RowSampling, Sampling, sample, sample_rows

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
