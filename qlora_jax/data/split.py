"""Holding out part of the training rows for evaluation."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def split_rows(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """`(training, evaluation)` rows, each in its original order; which go where follows from seed and count.

    Args:
        rows: at least two.
        fraction: the evaluation share, between 0 and 1; rounded, but at least one row goes to either side.
        seed: ≥ 0.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.eval={fraction} must lie between 0 and 1 to be a share of the training rows")
    if len(rows) < 2:
        raise ValueError(f"data.eval={fraction} holds out training rows and needs at least 2, found {len(rows)}")
    count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    training = [row for i, row in enumerate(rows) if i not in held_out]
    return training, [rows[i] for i in sorted(held_out)]
