"""Several documents in one row: best-fit decreasing bin packing."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Groups of document indices whose lengths sum to at most `seq_len`, every document in exactly one.

    Best-fit decreasing: longest documents first, each into the fullest group it still fits. Deterministic;
    equal lengths go in the order given, and the number of groups depends on the lengths alone, not their
    order. The sort is O(n log n); each placement searches at most `seq_len` distinct free spaces.

    Raises:
        ValueError: a length below 1 or above `seq_len`.
    """
    sizes = np.asarray(lengths, np.int64)
    bad = np.flatnonzero((sizes < 1) | (sizes > seq_len))
    if bad.size:
        raise ValueError(f"document {bad[0]} has {sizes[bad[0]]} tokens; expected 1 to seq_len={seq_len}")
    groups: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # free tokens -> the groups that have just that many
    spaces: list[int] = []  # the keys of with_space, sorted
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        at = bisect_left(spaces, size)
        if at == len(spaces):
            space = seq_len
            groups.append(group := [])
        else:
            space = spaces[at]
            group = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        group.append(document)
        if space - size not in with_space:
            insort(spaces, space - size)
        with_space.setdefault(space - size, []).append(group)
    return groups
