"""Batches as a pure function of the step, so that a resumed run needs to know nothing but its step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.documents import lengths
from qlora_jax.data.mixture import Share, draw
from qlora_jax.data.packing import pack
from qlora_jax.data.template import Encoded

# One optimizer step's data by name, `[A, B, T]` each: A microbatches (gradient accumulation), B rows, T tokens.
Batch = dict[str, NDArray]
# tokens: ids. segment_ids: 1, 2, … per document of a row, 0 for padding. positions: from 0 in each document.
# scored: True where the token is a label, predicted from those before it.
ARRAYS = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "scored": np.bool_}


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Training batches: `len()` is the steps per epoch, `at(step)` a step's batch.

    Every epoch is reshuffled by (seed, epoch) and shows every document at least once, or of each source its share (see
    `mixture.draw`); the last batch of an epoch is filled up from that epoch's first rows. Packing puts several
    documents in a row (see `pack`); without it each row is one document, padded. A dataset smaller than a batch is
    repeated cyclically, so that every batch has full size. `shares` weighs sources.

    Raises:
        ValueError: no documents, one longer than `seq_len`, a size below 1, or a negative seed.
    """

    encoded: Sequence[Encoded]
    seq_len: int
    batch_size: int
    grad_accum: int
    packing: bool
    seed: int
    pad_id: int
    shares: Sequence[Share] = ()
    rows: int = field(init=False)  # rows per epoch; packing makes them fewer than the documents
    # The plan of the epoch last asked for, so that `at` is cheap.
    _plans: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.encoded, seq_len=self.seq_len, batch_size=self.batch_size, grad_accum=self.grad_accum)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        # Where sources are drawn from by weight, other epochs may need a row more or less: it is left out or repeated.
        object.__setattr__(self, "rows", len(self._plan(0)))

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
        shape = (self.grad_accum, self.batch_size, self.seq_len)
        return {name: array.reshape(shape) for name, array in flat.items()}

    def _plan(self, epoch: int) -> list[list[int]]:
        """The document indices of each row, in the epoch's order."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = _epoch_plan(self, epoch)
            self._plans.clear()
            self._plans[epoch] = plan
        return plan


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
    flat = _assemble([[d] for d in documents] + empty, seq_len, pad_id)
    return {name: array[None] for name, array in flat.items()}


def _epoch_plan(batches: Batches, epoch: int) -> list[list[int]]:
    rng = np.random.default_rng([batches.seed, epoch])
    drawn = draw(len(batches.encoded), batches.shares, seed=batches.seed, epoch=epoch)
    order = rng.permutation(drawn)
    if not batches.packing:
        return [[i] for i in order.tolist()]
    # Packed from the shuffled order, documents of equal length meet different neighbours in each epoch.
    rows = pack(lengths(batches.encoded)[order], batches.seq_len)
    return [order[rows[row]].tolist() for row in rng.permutation(len(rows))]


def _assemble(rows: Sequence[Sequence[Encoded]], seq_len: int, pad_id: int) -> Batch:
    """The rows' documents laid end to end, padded: arrays `[rows, T]`."""
    flat: Batch = {name: np.zeros((len(rows), seq_len), dtype) for name, dtype in ARRAYS.items()}
    flat["tokens"][:] = pad_id
    for r, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, start=1):
            here = np.s_[r, start : start + len(document.ids)]
            flat["tokens"][here], flat["scored"][here] = document.ids, document.scored
            flat["segment_ids"][here], flat["positions"][here] = segment, np.arange(len(document.ids))
            start += len(document.ids)
    return flat


def _check(encoded: Sequence[Encoded], *, seq_len: int, batch_size: int, grad_accum: int) -> None:
    for name, value in (("train.batch_size", batch_size), ("train.grad_accum", grad_accum)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if not encoded:
        raise ValueError("no documents to make batches of; check that the data holds rows with scored tokens")
    longest = lengths(encoded).max()
    if longest > seq_len:
        raise ValueError(f"a document has {longest} tokens but {seq_len=}; encode with the same seq_len")
