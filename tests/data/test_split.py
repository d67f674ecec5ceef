import pytest

from qlora_jax.data import split_rows


def test_a_share_is_held_out_in_order_and_by_seed():
    rows = list(range(20))
    training, evaluation = split_rows(rows, 0.25, seed=0)
    assert sorted(training + evaluation) == rows
    assert len(evaluation) == 5
    assert (training, evaluation) == (sorted(training), sorted(evaluation))
    assert split_rows(rows, 0.25, seed=0) == (training, evaluation)
    assert split_rows(rows, 0.25, seed=1) != (training, evaluation)


def test_either_side_gets_a_row():
    assert [len(side) for side in split_rows([0, 1, 2], 0.01, seed=0)] == [2, 1]
    assert [len(side) for side in split_rows([0, 1, 2], 0.99, seed=0)] == [1, 2]


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [
        ([0, 1], 0.0, "data.eval=0.0 must lie between 0 and 1 to be a share of the training rows"),
        ([0, 1], 1.5, "data.eval=1.5 must lie between 0 and 1 to be a share of the training rows"),
        ([0], 0.5, "data.eval=0.5 holds out training rows and needs at least 2, found 1"),
    ],
)
def test_bad_shares(rows, fraction, expected):
    with pytest.raises(ValueError) as error:
        split_rows(rows, fraction, seed=0)
    assert str(error.value) == expected
