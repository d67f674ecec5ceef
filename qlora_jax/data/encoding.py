"""Many rows to documents: in batches, with rows that cannot be learned from counted and named."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.chat import ChatTemplate, has_chat_template
from qlora_jax.data.documents import Collector, Documents
from qlora_jax.data.formats import to_example, unread_columns
from qlora_jax.data.row import Row
from qlora_jax.data.template import Draft, Encoder, Tokens, TrainOn, check_length
from qlora_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LongRows = Literal["cut", "split", "drop"]
BATCH = 1024  # rows tokenized together
NAMED = 5  # bad rows that a message names
SPEAKS_EVERY = 5.0  # seconds between lines of progress
FEW_BAD_ROWS, SHARE_OF_BAD_ROWS = 10, 0.01


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows become documents.

    seq_len: the most tokens of a document. train_on: as in `encode`. long_rows: what becomes of longer rows: their end
    is cut off, they become several documents, or they are left out. max_bad_rows: how many rows may be left out because
    nothing can be learned from them, as a number or as a share; None is the larger of 10 rows and 1 %.
    """

    seq_len: int
    train_on: TrainOn = "completions"
    long_rows: LongRows = "cut"
    max_bad_rows: int | float | None = None

    def allowed_bad_rows(self, rows: int) -> int:
        if self.max_bad_rows is None:
            return max(FEW_BAD_ROWS, int(SHARE_OF_BAD_ROWS * rows))
        return self.max_bad_rows if isinstance(self.max_bad_rows, int) else int(self.max_bad_rows * rows)


@dataclass(kw_only=True)
class Report:
    """What became of the rows. tokens: of all documents. unseen: tokens of long rows that are in no document."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    long: int = 0
    unseen: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # (origin, reason)
    unread: list[str] = field(default_factory=list)  # columns
    counts: list[int] = field(default_factory=list)  # rows of each source

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Report":
        """What `to_dict` gave, also where JSON has made lists of pairs."""
        return cls(**{**settings, "bad": [(origin, reason) for origin, reason in settings["bad"]]})


def encode_all(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    chat_template: str | None = None,
    today: datetime | None = None,
) -> tuple[Documents, Report]:
    """Every row as documents, in order, and what became of them. Reads the rows once, and keeps none.

    Args:
        rows: in any form of `formats`.
        chat_template: Jinja text that replaces the tokenizer's own template.
        today: the date that templates are told which write one; None is the clock's.

    Raises:
        ValueError: no eos token, or a bad setting. Rows that cannot be learned from are in the report.
    """
    check_length(settings.seq_len)
    template = ChatTemplate(tokenizer, chat_template, today) if has_chat_template(tokenizer, chat_template) else None
    encoder = Encoder(tokenizer, train_on=settings.train_on, template=template)
    collector, report = Collector(), Report()
    batches = _drafts(_with_progress(enumerate(rows)), encoder, report, alpaca_as_chat=template is not None)
    for drafts, tokens in _a_batch_ahead(batches, lambda drafts: encoder.tokenize([draft for _, _, draft in drafts])):
        for (number, origin, draft), one in zip(drafts, tokens, strict=True):
            try:
                ids, scored = encoder.encode(draft, one)
            except ValueError as error:
                report.bad.append((origin, str(error)))
                continue
            _add(collector, report, settings, number, origin, ids, scored)
    return collector.documents(), report


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    train_on: TrainOn = "completions",
    chat_template: str | None = None,
    long_rows: LongRows = "cut",
    max_bad_rows: int | float | None = None,
) -> Documents:
    """`encode_all`, and then `judge`: what was cut or left out is logged, and too much of it is refused.

    Raises:
        ValueError: too many bad rows (the first ones are named by file and row), or no row has a scored token.
    """
    settings = Settings(seq_len=seq_len, train_on=train_on, long_rows=long_rows, max_bad_rows=max_bad_rows)
    documents, report = encode_all(rows, tokenizer, settings, chat_template=chat_template)
    judge(report, settings)
    return documents


def judge(report: Report, settings: Settings) -> None:
    """Logs what became of the rows. ValueError where more than the allowed number are bad, or nothing is left."""
    bad, allowed = len(report.bad), settings.allowed_bad_rows(report.rows)
    named = "; ".join(f"{origin}: {reason}" for origin, reason in report.bad[:NAMED])
    listing = named + (f"; and {bad - NAMED} more" if bad > NAMED else "")
    if bad > allowed:
        raise ValueError(
            f"{bad} of {report.rows} rows cannot be learned from, and config.data.max_bad_rows allows {allowed}: "
            f"{listing}"
        )
    if not report.documents:
        raise ValueError(
            f"none of the {report.rows} rows has a token to learn within train.seq_len={settings.seq_len}: "
            f"{listing or f'{report.long} are longer, and config.data.long_rows={settings.long_rows!r}'}"
        )
    if bad:
        logger.warning(f"{bad} of {report.rows} rows are left out, from which nothing can be learned: {listing}")
    if report.long:
        logger.warning(_words_for_long_rows(report, settings))
    if report.unread:
        logger.warning(f"columns that are not read: {', '.join(report.unread)}")


def _words_for_long_rows(report: Report, settings: Settings) -> str:
    become = {"cut": "are cut", "split": "are split", "drop": "are left out"}[settings.long_rows]
    share = report.unseen / (report.unseen + report.tokens)
    unseen = f"{report.unseen:,} tokens ({share:.1%}) are not seen" if report.unseen else "every token is seen"
    return (
        f"{report.long} of {report.rows} rows are longer than train.seq_len={settings.seq_len} and {become} "
        f"(config.data.long_rows): {unseen}"
    )


Drafts = list[tuple[int, str, Draft]]  # (the row's number, its origin, what is to be tokenized)


def _drafts(
    numbered: Iterator[tuple[int, Row]], encoder: Encoder, report: Report, *, alpaca_as_chat: bool
) -> Iterator[Drafts]:
    """The rows in batches, less those that cannot be learned from, which are reported."""
    seen: set[frozenset[str]] = set()  # the sets of columns that rows had so far
    while batch := list(itertools.islice(numbered, BATCH)):
        report.rows += len(batch)
        drafts: Drafts = []
        for number, row in batch:
            try:
                drafts.append((number, row.origin, encoder.draft(to_example(row, alpaca_as_chat=alpaca_as_chat))))
            except ValueError as error:
                report.bad.append((row.origin, str(error).removeprefix(f"{row.origin}: ")))
                continue
            columns = frozenset(name for name, value in row.values.items() if value is not None)
            if columns not in seen:
                seen.add(columns)
                unread = unread_columns(row, alpaca_as_chat=alpaca_as_chat) - set(report.unread)
                report.unread.extend(sorted(unread))
        yield drafts


def _a_batch_ahead(
    batches: Iterator[Drafts], tokenize: Callable[[Drafts], list[Tokens]]
) -> Iterator[tuple[Drafts, list[Tokens]]]:
    """Each batch with its tokens. While one is tokenized, in a thread that needs no Python, the next is rendered."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: tuple[Drafts, Future[list[Tokens]]] | None = None
        for drafts in batches:
            started = (drafts, thread.submit(tokenize, drafts))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = started
        if waiting:
            yield waiting[0], waiting[1].result()


def _add(
    collector: Collector,
    report: Report,
    settings: Settings,
    number: int,
    origin: str,
    ids: Sequence[int],
    scored: NDArray[np.bool_],
) -> None:
    pieces = _pieces(len(ids), settings)
    kept = [(start, end) for start, end in pieces if scored[start + 1 : end].any()]
    is_long = len(ids) > settings.seq_len
    report.long += is_long
    for start, end in kept:
        here = scored[start:end].copy()
        here[0] = False
        collector.add(ids[start:end], here, number)
        report.documents += 1
        report.tokens += end - start
    report.unseen += len(ids) - (kept[-1][1] if kept else 0)
    if not kept and not (is_long and settings.long_rows == "drop"):
        cut = f"; it has {len(ids)} and is cut before its answer: raise train.seq_len" if is_long else ""
        report.bad.append((origin, f"no token to learn within train.seq_len={settings.seq_len}{cut}"))


def _pieces(length: int, settings: Settings) -> list[tuple[int, int]]:
    """The documents [start, end) of a row. Each begins with the last token of the one before, to predict the next."""
    longest = settings.seq_len
    if length <= longest:
        return [(0, length)]
    match settings.long_rows:
        case "cut":
            return [(0, longest)]
        case "drop":
            return []
        case "split":
            return [(start, min(start + longest, length)) for start in range(0, length - 1, longest - 1)]


def _with_progress(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """The rows, with a line in the log every few seconds."""
    started = spoken = time.monotonic()
    for number, row in rows:
        now = time.monotonic()
        if now - spoken >= SPEAKS_EVERY:
            spoken = now
            logger.info(f"encoding: {number:,} rows, {number / (now - started):,.0f} a second, at {row.origin}")
        yield number, row
