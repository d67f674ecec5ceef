import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data import pack


def test_best_fit_decreasing():
    #      7 | 6+3 | 5+4 | 2+2 → the 2s go where least is left: 2 beside 7, then 2 … no group has 2 free
    assert pack([2, 5, 7, 3, 6, 4, 2], 9) == [[2, 0], [4, 3], [1, 5], [6]]


def test_equal_lengths_keep_their_order():
    assert pack([4] * 100, 8) == [[i, i + 1] for i in range(0, 100, 2)]
    assert pack([3, 4] * 50, 7) == [[i, 99 - i] for i in range(1, 100, 2)]


def test_full_rows_stay_alone():
    assert pack([8, 1, 8], 8) == [[0], [2], [1]]


@given(lengths=st.lists(st.integers(1, 50), max_size=60), seq_len=st.integers(50, 80), seed=st.integers(0, 9))
def test_every_document_once_never_too_long_and_as_many_rows_in_any_order(lengths, seq_len, seed):
    groups = pack(lengths, seq_len)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= seq_len for group in groups)
    assert len(pack(np.random.default_rng(seed).permutation(lengths).tolist(), seq_len)) == len(groups)


def test_density_on_instruction_like_lengths():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int).clip(8, 2048)
    groups = pack(lengths.tolist(), 2048)
    assert lengths.sum() / (len(groups) * 2048) > 0.99


def test_density_on_uniform_lengths():
    lengths = np.random.default_rng(0).integers(1, 513, 5_000)
    assert lengths.sum() / (len(pack(lengths.tolist(), 512)) * 512) > 0.95


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 9], "document 1 has 9 tokens; expected 1 to seq_len=8"),
        ([0], "document 0 has 0 tokens; expected 1 to seq_len=8"),
    ],
)
def test_lengths_out_of_range(lengths, expected):
    with pytest.raises(ValueError) as error:
        pack(lengths, 8)
    assert str(error.value) == expected
