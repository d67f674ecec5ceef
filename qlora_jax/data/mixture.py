"""Which documents an epoch shows: a function of (seed, epoch) alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Share:
    """Documents of one source, and its weight: its part of every epoch is the weight over the sum of all weights.

    documents: int64 `[D]`, their numbers.
    """

    documents: NDArray[np.int64]
    weight: float


def draw(count: int, shares: Sequence[Share], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The documents of an epoch, by number, not yet shuffled: int64 `[count]`.

    Without shares every one of the `count` documents once. With them as many as there are, of each source its part: a
    source goes through all its documents, shuffled, before it shows one again, from one epoch into the next.
    """
    if not shares:
        return np.arange(count)
    quotas = enumerate(zip(shares, _quotas(count, shares), strict=True))
    return np.concatenate(
        [
            _pass_through(share.documents, quota, seed=seed, source=source, epoch=epoch)
            for source, (share, quota) in quotas
        ]
    )


def _quotas(count: int, shares: Sequence[Share]) -> list[int]:
    """How many documents each source gives to an epoch: at least one, and `count` in all where there are enough."""
    weights = np.array([share.weight for share in shares])
    borders = np.rint(np.cumsum(weights) / weights.sum() * count).astype(int)
    return [max(int(quota), 1) for quota in np.diff(borders, prepend=0)]


def _pass_through(documents: NDArray[np.int64], quota: int, *, seed: int, source: int, epoch: int) -> NDArray[np.int64]:
    """The next `quota` of the source's documents in an endless row of shuffled passes."""
    places = np.arange(epoch * quota, (epoch + 1) * quota)
    passes, within = np.divmod(places, len(documents))
    taken = np.empty(quota, np.int64)
    for number in np.unique(passes):
        shuffled = np.random.default_rng([seed, int(number), source]).permutation(documents)
        here = passes == number
        taken[here] = shuffled[within[here]]
    return taken
