"""Batches as a pure function of the step, so that a resumed run needs to know nothing but its step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.packing import pack
from qlora_jax.data.template import Encoded


class Batch(NamedTuple):
    """One optimizer step's data `[A, B, T]`: A microbatches (gradient accumulation), B rows, T tokens.

    tokens: int32. segment_ids: int32, 1, 2, … per document of a row, 0 for padding. positions: int32, from 0
    in each document. scored: bool, True where the token is a label, predicted from those before it.
    """

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    scored: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Training batches: `len()` is the steps per epoch, `at(step)` a step's batch. Built by `make_batches`.

    Every epoch is reshuffled by (seed, epoch) and shows every document at least once; the last batch of an
    epoch is filled up from that epoch's first rows.
    """

    encoded: Sequence[Encoded]
    seq_len: int
    batch_size: int
    grad_accum: int
    packing: bool
    seed: int
    pad_id: int
    rows: int  # rows per epoch; packing makes them fewer than the documents
    # The plan of the epoch last asked for, so that `at` is cheap.
    _plans: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.grad_accum))

    def at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0 over all epochs; the same bits on every call."""
        if step < 0:
            raise ValueError(f"{step=} must be 0 or more")
        epoch, index = divmod(step, len(self))
        plan, size = self._plan(epoch), self.batch_size * self.grad_accum
        rows = [plan[i % len(plan)] for i in range(index * size, (index + 1) * size)]
        flat = _assemble([[self.encoded[i] for i in row] for row in rows], self.seq_len, self.pad_id)
        return Batch._make(array.reshape(self.grad_accum, self.batch_size, self.seq_len) for array in flat)

    def _plan(self, epoch: int) -> list[list[int]]:
        """The document indices of each row, in the epoch's order."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = _epoch_plan(self, np.random.default_rng([self.seed, epoch]))
            self._plans.clear()
            self._plans[epoch] = plan
        return plan


def make_batches(
    encoded: Sequence[Encoded],
    *,
    seq_len: int,
    batch_size: int,
    grad_accum: int,
    packing: bool,
    seed: int,
    pad_id: int,
) -> Batches:
    """Training batches of `grad_accum` microbatches of `batch_size` rows of `seq_len` tokens.

    Packing puts several documents in a row (see `pack`); without it each row is one document, padded. A
    dataset smaller than a batch is repeated cyclically, so that every batch has full size.

    Raises:
        ValueError: no documents, one longer than `seq_len`, or a size below 1.
    """
    _check(encoded, seq_len=seq_len, batch_size=batch_size, grad_accum=grad_accum)
    if seed < 0:
        raise ValueError(f"{seed=} must be 0 or more")
    rows = len(pack([len(one.ids) for one in encoded], seq_len)) if packing else len(encoded)
    return Batches(
        encoded=encoded,
        seq_len=seq_len,
        batch_size=batch_size,
        grad_accum=grad_accum,
        packing=packing,
        seed=seed,
        pad_id=pad_id,
        rows=rows,
    )


def eval_batches(encoded: Sequence[Encoded], *, seq_len: int, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Batches `[1, B, T]`: every document once, in order, one to a row; empty rows fill the last batch.

    Raises:
        ValueError: no documents, one longer than `seq_len`, or a size below 1.
    """
    _check(encoded, seq_len=seq_len, batch_size=batch_size, grad_accum=1)
    return (
        _eval_batch(encoded[start : start + batch_size], seq_len, batch_size, pad_id)
        for start in range(0, len(encoded), batch_size)
    )


def _eval_batch(documents: Sequence[Encoded], seq_len: int, batch_size: int, pad_id: int) -> Batch:
    empty: list[list[Encoded]] = [[]] * (batch_size - len(documents))
    return Batch._make(array[None] for array in _assemble([[d] for d in documents] + empty, seq_len, pad_id))


def _epoch_plan(batches: Batches, rng: np.random.Generator) -> list[list[int]]:
    order = rng.permutation(len(batches.encoded)).tolist()
    if not batches.packing:
        return [[i] for i in order]
    # Packed from the shuffled order, documents of equal length meet different neighbours in each epoch.
    rows = pack([len(batches.encoded[i].ids) for i in order], batches.seq_len)
    return [[order[i] for i in rows[row]] for row in rng.permutation(len(rows))]


def _assemble(rows: Sequence[Sequence[Encoded]], seq_len: int, pad_id: int) -> Batch:
    """The rows' documents laid end to end, padded: arrays `[rows, T]`."""
    shape = (len(rows), seq_len)
    tokens, scored = np.full(shape, pad_id, np.int32), np.zeros(shape, np.bool_)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, start=1):
            here = np.s_[r, start : start + len(document.ids)]
            tokens[here], scored[here] = document.ids, document.scored
            segments[here], positions[here] = segment, np.arange(len(document.ids))
            start += len(document.ids)
    return Batch(tokens, segments, positions, scored)


def _check(encoded: Sequence[Encoded], *, seq_len: int, batch_size: int, grad_accum: int) -> None:
    for name, value in (("train.batch_size", batch_size), ("train.grad_accum", grad_accum)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if not encoded:
        raise ValueError("no documents to make batches of; check that the data holds rows with scored tokens")
    longest = max(len(one.ids) for one in encoded)
    if longest > seq_len:
        raise ValueError(f"a document has {longest} tokens but {seq_len=}; encode with the same seq_len")
