"""The configured training and evaluation data, encoded and batched."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np

from qlora_jax.config import Config, DataSection
from qlora_jax.data import Batches, Documents, Encoded, Row, pad_id, split_rows
from qlora_jax.data import cache as encoded_cache
from qlora_jax.data.chat import TODAY
from qlora_jax.data.encoding import Report, Settings, encode_all, judge
from qlora_jax.data.mixture import Share
from qlora_jax.data.sources import Source, open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Batches to train on, and the documents to evaluate on (none without data.eval)."""

    batches: Batches
    eval_documents: Sequence[Encoded]


def prepare(config: Config, tokenizer, today: datetime | None = None) -> Dataset:
    """Reads, encodes and packs what `config.data` names.

    Args:
        tokenizer: with the chat template of the run.
        today: the date that chat templates are told which write one; a run keeps its own. None is the clock's.

    Raises:
        ValueError, FileNotFoundError: rows that are not there, or from which too little can be learned.
    """
    sources = _training_sources(config.data)
    reader = _Reader(config, tokenizer, today)
    documents, report = reader.documents(sources)
    eval_documents: Sequence[Encoded] = []
    if isinstance(config.data.eval, float):
        kept, held_out = split_rows(range(report.rows), config.data.eval, config.seed)
        held_out = held_out[: config.train.eval_rows or None]
        documents, eval_documents = documents.of_rows(np.array(kept)), documents.of_rows(np.array(held_out))
    elif config.data.eval:
        source = open_source(config.data.eval, config.data.eval_split or "validation")
        eval_documents, _ = reader.documents([source], limit=config.train.eval_rows)
    shares = _shares(config.data, documents, report.counts)
    return Dataset(batches=_batches(config, documents, pad_id(tokenizer), shares), eval_documents=eval_documents)


def random_tokens(config: Config, vocab_size: int) -> Dataset:
    """Full rows of random tokens, all scored: for measuring speed and memory without a tokenizer."""
    rng = np.random.default_rng(config.seed)
    count = config.train.batch_size * config.train.grad_accum
    ids = rng.integers(0, vocab_size, (count, config.train.seq_len), np.int32)
    scored = np.arange(config.train.seq_len) > 0
    documents = [Encoded(ids=row, scored=scored) for row in ids]
    return Dataset(batches=_batches(config, documents, 0), eval_documents=[])


class _Reader:
    """Sources to documents, through the cache."""

    def __init__(self, config: Config, tokenizer, today: datetime | None) -> None:
        data = config.data
        self._tokenizer, self._today, self._cached = tokenizer, today, data.cache
        self._settings = Settings(
            seq_len=config.train.seq_len,
            train_on=data.train_on,
            long_rows=data.long_rows,
            max_bad_rows=data.max_bad_rows,
        )

    def documents(self, sources: Sequence[Source], limit: int = 0) -> tuple[Documents, Report]:
        """Every document of the sources' rows (of the first `limit`, where it is not 0), and what became of them."""
        key = self._key(sources, limit) if self._cached else None
        found = encoded_cache.load(key) if key else None
        documents, report = found or self._encoded(sources, limit)
        for source, count in zip(sources, report.counts, strict=True):
            logger.info(f"rows: {source.words()}" + (f"; {count:,} rows, encoded before" if found else ""))
        if not report.rows:
            raise ValueError(f"{sources[0].name} holds no rows; training and evaluation need at least one")
        judge(report, self._settings)
        if key and not found:
            encoded_cache.store(key, documents, report)
        return documents, report

    def _encoded(self, sources: Sequence[Source], limit: int) -> tuple[Documents, Report]:
        counts = [0] * len(sources)
        rows = itertools.islice(_counted(sources, counts), limit or None)
        documents, report = encode_all(rows, self._tokenizer, self._settings, today=self._today)
        report.counts = counts
        return documents, report

    def _key(self, sources: Sequence[Source], limit: int) -> str | None:
        """None where a source does not say what its rows are."""
        identities = [source.identity() for source in sources]
        dated = TODAY in str(self._tokenizer.chat_template)
        today = (self._today or datetime.now()).date().isoformat() if dated else None
        settings = {**asdict(self._settings), "max_bad_rows": None}  # it judges the rows, and changes none
        assumed: dict[str, Any] = {"rows": identities, "limit": limit, "settings": settings, "today": today}
        key = encoded_cache.cache_key(assumed, self._tokenizer)
        return key if all(identities) else None


def _counted(sources: Sequence[Source], counts: list[int]) -> Iterator[Row]:
    """All rows, one source after the other, counted source by source."""
    for number, source in enumerate(sources):
        for row in source.rows():
            counts[number] += 1
            yield row


def _training_sources(data: DataSection) -> list[Source]:
    if not data.train:
        raise ValueError(
            "config.data.train is not set: give a .jsonl, .json or .parquet file, a folder or a Hub dataset"
        )
    if isinstance(data.train, str):
        return [open_source(data.train, data.split)]
    weighted = ["weight" in item for item in data.train]
    if any(weighted) and not all(weighted):
        raise ValueError("config.data.train: some sources have a weight and some have none: give it to all, or to none")
    return [open_source(item["path"], item.get("split", data.split)) for item in data.train]


def _shares(data: DataSection, documents: Documents, counts: Sequence[int]) -> list[Share]:
    """For each weighted source its documents, by their numbers in `documents`; none where nothing is weighted."""
    if isinstance(data.train, str) or "weight" not in data.train[0]:
        return []
    source_of = np.searchsorted(np.cumsum(counts), documents.rows[documents.chosen], side="right")
    shares = []
    for number, item in enumerate(data.train):
        its = np.flatnonzero(source_of == number)
        if not len(its):
            raise ValueError(f"config.data.train: nothing can be learned from {item['path']!r}, which has a weight")
        shares.append(Share(documents=its, weight=item["weight"]))
    return shares


def _batches(config: Config, documents: Sequence[Encoded], pad: int, shares: Sequence[Share] = ()) -> Batches:
    return Batches(
        encoded=documents,
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        grad_accum=config.train.grad_accum,
        packing=config.data.packing,
        seed=config.seed,
        pad_id=pad,
        shares=shares,
    )
