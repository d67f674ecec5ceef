import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import Batches, Encoded, eval_batches

PAD = 99


def document(number, length):
    """`length` tokens that all read `number`, scored but for the first."""
    return Encoded(ids=np.full(length, number, np.int32), scored=np.arange(length) > 0)


def batches_of(lengths, **settings):
    defaults = dict(seq_len=6, batch_size=1, grad_accum=1, packing=False, seed=0, pad_id=PAD)
    documents = [document(number, length) for number, length in enumerate(lengths)]
    return Batches(encoded=documents, **{**defaults, **settings})


def documents_in(batch):
    """The numbers of the documents of a batch, by their first tokens."""
    return batch["tokens"][(batch["positions"] == 0) & (batch["segment_ids"] > 0)].tolist()


def test_a_packed_row_token_by_token():
    batch = batches_of([2, 3], packing=True).at(0)
    assert batch["tokens"].tolist() == [[[1, 1, 1, 0, 0, PAD]]]
    assert batch["segment_ids"].tolist() == [[[1, 1, 1, 2, 2, 0]]]
    assert batch["positions"].tolist() == [[[0, 1, 2, 0, 1, 0]]]
    assert batch["scored"].tolist() == [[[False, True, True, False, True, False]]]
    assert [array.dtype for array in batch.values()] == [np.int32, np.int32, np.int32, np.bool_]


def test_a_padded_row_token_by_token():
    batch = batches_of([2]).at(0)
    assert batch["tokens"].tolist() == [[[0, 0, PAD, PAD, PAD, PAD]]]
    assert batch["segment_ids"].tolist() == [[[1, 1, 0, 0, 0, 0]]]
    assert batch["positions"].tolist() == [[[0, 1, 0, 0, 0, 0]]]
    assert batch["scored"].tolist() == [[[False, True, False, False, False, False]]]


def test_microbatches_lead():
    batches = batches_of([2] * 12, batch_size=3, grad_accum=2)
    assert len(batches) == 2
    assert [array.shape for array in batches.at(0).values()] == [(2, 3, 6)] * 4


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    batch_size=st.integers(1, 4),
    grad_accum=st.integers(1, 3),
    packing=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_an_epoch_shows_every_document_and_repeats_only_to_fill_the_last_batch(
    lengths, batch_size, grad_accum, packing, epoch
):
    batches = batches_of(lengths, batch_size=batch_size, grad_accum=grad_accum, packing=packing)
    steps = [batches.at(epoch * len(batches) + i) for i in range(len(batches))]
    shown = [number for batch in steps for row in batch["tokens"].reshape(-1, 6) for number in set(row) - {PAD}]
    assert set(shown) == set(range(len(lengths)))
    rows = np.concatenate([batch["tokens"].reshape(-1, 6) for batch in steps])
    assert len(rows) - batches.rows < batch_size * grad_accum
    first_time = [number for row in rows[: batches.rows] for number in set(row.tolist()) - {PAD}]
    assert sorted(first_time) == list(range(len(lengths)))
    assert (rows[batches.rows :] == rows[np.arange(len(rows) - batches.rows) % batches.rows]).all()
    for batch in steps:
        assert not batch["scored"][batch["positions"] == 0].any()
        assert ((batch["tokens"] == PAD) == (batch["segment_ids"] == 0)).all()


@pytest.mark.parametrize("packing", [False, True])
def test_at_is_a_pure_function_of_seed_and_step(packing):
    lengths = np.random.default_rng(1).integers(1, 7, 40).tolist()
    run = batches_of(lengths, packing=packing, seed=5)
    whole = [run.at(step) for step in range(3 * len(run))]
    resumed = batches_of(lengths, packing=packing, seed=5)
    for step in (2 * len(run) + 1, 3, len(run), 0):  # out of order and across epochs
        for array, expected in zip(resumed.at(step).values(), whole[step].values(), strict=True):
            assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_and_seeds_shuffle_anew(packing):
    run, other = batches_of([1, 2] * 20, packing=packing), batches_of([1, 2] * 20, packing=packing, seed=1)
    epochs = [[documents_in(run.at(epoch * len(run) + i)) for i in range(len(run))] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [documents_in(other.at(i)) for i in range(len(other))]
    if packing:  # not only the order of the rows, also who shares one
        assert {frozenset(row) for row in epochs[0]} != {frozenset(row) for row in epochs[1]}


def test_packed_rows_do_not_come_sorted_by_length():
    run = batches_of([4, 5, 6] * 5, packing=True)
    lengths = [int((run.at(step)["segment_ids"] > 0).sum()) for step in range(len(run))]
    assert sorted(lengths) == [4] * 5 + [5] * 5 + [6] * 5
    assert lengths != sorted(lengths, reverse=True)


def test_the_shuffle_is_the_promised_one():
    order = np.random.default_rng([7, 1]).permutation(5).tolist()
    run = batches_of([2] * 5, seed=7)
    assert [documents_in(run.at(5 + i)) for i in range(5)] == [[number] for number in order]


def test_a_dataset_smaller_than_a_batch_is_repeated():
    run = batches_of([2, 2], batch_size=5)
    assert len(run) == 1
    shown = documents_in(run.at(0))
    assert shown == [shown[0], shown[1]] * 2 + [shown[0]]
    assert set(shown) == {0, 1}


def test_evaluation_shows_every_row_once_in_order():
    documents = [document(number, 3) for number in range(3)]
    first, last = eval_batches(documents, seq_len=4, batch_size=2, pad_id=PAD)
    assert first["tokens"].tolist() == [[[0, 0, 0, PAD], [1, 1, 1, PAD]]]
    assert last["tokens"].tolist() == [[[2, 2, 2, PAD], [PAD] * 4]]
    assert last["segment_ids"].tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]]]
    assert last["positions"].tolist() == [[[0, 1, 2, 0], [0, 0, 0, 0]]]
    assert last["scored"].tolist() == [[[False, True, True, False], [False] * 4]]


@pytest.mark.parametrize(
    ("lengths", "settings", "expected"),
    [
        ([], {}, "no documents to make batches of; check that the data holds rows with scored tokens"),
        ([2], {"batch_size": 0}, "train.batch_size=0 must be 1 or more"),
        ([2], {"grad_accum": 0}, "train.grad_accum=0 must be 1 or more"),
        ([2, 9], {}, "a document has 9 tokens but seq_len=6; encode with the same seq_len"),
        ([2], {"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_bad_settings(lengths, settings, expected):
    with pytest.raises(ValueError) as error:
        batches_of(lengths, **settings)
    assert str(error.value) == expected


def test_bad_settings_of_evaluation_fail_at_the_call():
    with pytest.raises(ValueError, match=r"^train\.batch_size=0 must be 1 or more$"):
        eval_batches([document(0, 2)], seq_len=4, batch_size=0, pad_id=PAD)


def test_a_negative_step():
    with pytest.raises(ValueError, match=r"^step=-1 must be 0 or more$"):
        batches_of([2]).at(-1)
