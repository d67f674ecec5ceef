"""Sources by weight: a function of (seed, epoch) alone."""

from collections import Counter

import numpy as np
import pytest

from qlora_jax.data import Batches, Encoded
from qlora_jax.data.mixture import Share, draw

# Documents 0 to 9 of one source, 10 to 99 of another, by 3 to 1.
SHARES = [Share(documents=np.arange(10), weight=3), Share(documents=np.arange(10, 100), weight=1)]


def test_without_shares_every_document_is_drawn_once():
    assert draw(4, [], seed=0, epoch=3).tolist() == [0, 1, 2, 3]


def test_every_epoch_has_the_weights():
    for epoch in range(5):
        drawn = draw(100, SHARES, seed=1, epoch=epoch)
        assert (len(drawn), np.sum(drawn < 10)) == (100, 75)


def test_a_source_shows_all_it_has_before_anything_again():
    few, many = zip(
        *[(d[d < 10], d[d >= 10]) for d in (draw(100, SHARES, seed=1, epoch=e) for e in range(4))], strict=True
    )
    assert set(Counter(np.concatenate(few)).values()) == {30}  # 4 × 75 over 10
    first_pass = np.concatenate(many)[:90]
    assert sorted(first_pass.tolist()) == list(range(10, 100))


def test_seeds_and_epochs_differ_and_repeat():
    one = draw(100, SHARES, seed=1, epoch=2)
    assert one.tolist() == draw(100, SHARES, seed=1, epoch=2).tolist()
    assert one.tolist() != draw(100, SHARES, seed=2, epoch=2).tolist()
    assert one.tolist() != draw(100, SHARES, seed=1, epoch=3).tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_batches_of_a_mixture_follow_from_the_step(packing):
    documents = [Encoded(ids=np.full(5, i, np.int32), scored=np.arange(5) > 0) for i in range(100)]
    settings = dict(seq_len=10, batch_size=2, grad_accum=1, packing=packing, seed=3, pad_id=999, shares=SHARES)
    first, again = Batches(encoded=documents, **settings), Batches(encoded=documents, **settings)
    assert len(first) == (25 if packing else 50)
    for step in (2 * len(first) + 3, 0, 7):  # in any order
        np.testing.assert_array_equal(first.at(step)["tokens"], again.at(step)["tokens"])
    epoch = np.concatenate([first.at(step)["tokens"] for step in range(len(first))])
    assert np.sum(epoch < 10) == 5 * 75
