"""Encoded documents laid end to end in three arrays: five bytes a token, however many documents there are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.template import Encoded


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents(Sequence[Encoded]):
    """A sequence of `Encoded`, which are views.

    ids: int32 `[N]` and scored: bool `[N]` of all documents, one after the other. starts: int64 `[D + 1]`, where each
    begins. rows: int64 `[D]`, the row that each comes from, counted from 0. chosen: int64 `[C]`, the documents that
    this sequence holds, in its order.
    """

    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    chosen: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Encoded | Documents":
        if isinstance(index, slice):
            return self.take(self.chosen[index])
        document = self.chosen[index]
        here = slice(self.starts[document], self.starts[document + 1])
        return Encoded(ids=self.ids[here], scored=self.scored[here])

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document: `[C]`."""
        return np.diff(self.starts)[self.chosen]

    def take(self, documents: NDArray[np.int64]) -> "Documents":
        """The same arrays, with other documents chosen by their numbers."""
        return Documents(ids=self.ids, scored=self.scored, starts=self.starts, rows=self.rows, chosen=documents)

    def of_rows(self, rows: NDArray[np.int64]) -> "Documents":
        """The documents that come from these rows, in the documents' order."""
        return self.take(self.chosen[np.isin(self.rows[self.chosen], rows)])


def lengths(documents: Sequence[Encoded]) -> NDArray[np.int64]:
    """Tokens of each document: `[D]`."""
    if isinstance(documents, Documents):
        return documents.lengths
    return np.array([len(one.ids) for one in documents], np.int64)


class Collector:
    """Documents in the making: arrays that grow in place."""

    def __init__(self) -> None:
        self._ids, self._scored = _Growing(np.int32), _Growing(np.bool_)
        self._starts, self._rows = _Growing(np.int64), _Growing(np.int64)
        self._starts.extend([0])

    def add(self, ids: Any, scored: NDArray[np.bool_], row: int) -> None:
        self._ids.extend(ids)
        self._scored.extend(scored)
        self._starts.extend([self._ids.used])
        self._rows.extend([row])

    def documents(self) -> Documents:
        rows = self._rows.array()
        return Documents(
            ids=self._ids.array(),
            scored=self._scored.array(),
            starts=self._starts.array(),
            rows=rows,
            chosen=np.arange(len(rows)),
        )


class _Growing:
    def __init__(self, dtype: Any) -> None:
        self._array, self.used = np.empty(1024, dtype), 0

    def extend(self, values: Any) -> None:
        end = self.used + len(values)
        if end > len(self._array):
            self._array.resize(max(end, len(self._array) * 5 // 4), refcheck=False)
        self._array[self.used : end] = values
        self.used = end

    def array(self) -> NDArray[Any]:
        self._array.resize(self.used, refcheck=False)
        return self._array
