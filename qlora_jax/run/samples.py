"""Answers of a model to evaluation rows: for the report's before/after samples and for exact match."""

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_jax.data import Encoded
from qlora_jax.generation import Generator, bucket
from qlora_jax.quant.host_table import with_table_on_device
from qlora_jax.run.groups import groups
from qlora_jax.training.step import Parts

logger = logging.getLogger(__name__)

# What a sample may say where its row expects less.
SHORTEST_SAMPLE = 48
# The same text may be said in more tokens than a tokenizer would take for it.
SPARE = 8


@dataclass(frozen=True, eq=False)
class Turn:
    """One answer that a row expects.

    Attributes:
      prompt: the ids before it, int32 `[T]`.
      expected: its own ids, with what ends it.
      last: whether the row ends with it.
    """

    prompt: np.ndarray
    expected: np.ndarray
    last: bool


def turns_of(document: Encoded) -> list[Turn]:
    """The runs of scored tokens: each is what the assistant says at one time."""
    edges = np.flatnonzero(np.diff(document.scored.astype(np.int8), prepend=0, append=0))
    ids = document.ids
    return [Turn(ids[:start], ids[start:end], bool(end == len(ids))) for start, end in edges.reshape(-1, 2)]


class Answerer:
    """A model that answers rows greedily.

    Args:
      parts: the model.
      stop_ids: tokens that end a text, by the model's folder. The special tokens that end the rows' turns do so, too.
      positions: how long a text may become.
    """

    def __init__(self, parts: Parts, tokenizer: Any, *, stop_ids: Iterable[int], positions: int):
        self._parts, self._tokenizer = parts, tokenizer
        self._stop_ids, self._positions = set(stop_ids), positions

    def exact_match(self, documents: Sequence[Encoded]) -> dict[str, float]:
        """{"exact_match": the share of answers that are what their turn says, but for surrounding white space}.

        Empty where no row holds a whole answer: one that was cut is not compared, which is logged.
        """
        turns = [turn for document in documents for turn in turns_of(document)]
        stops = self._stops(turns)
        whole = [turn for turn in turns if not turn.last or int(turn.expected[-1]) in stops]
        if len(whole) < len(turns):
            announce(f"{len(turns) - len(whole)} of {len(turns)} answers are cut in the rows, and not compared exactly")
        if not whole:
            return {}
        said = self._answers(whole, [len(turn.expected) + SPARE for turn in whole], stops)
        short = sum(len(turn.prompt) + len(turn.expected) > self._positions for turn in whole)
        self._say_short(short, len(whole))
        hits = [self._is(ids, turn, stops) for ids, turn in zip(said, whole, strict=True)]
        return {"exact_match": sum(hits) / len(hits)}

    def samples(self, documents: Sequence[Encoded]) -> list[str]:
        """What the model says in the place of each document's first answer."""
        turns = [turns_of(document)[0] for document in documents]
        wanted = [max(SHORTEST_SAMPLE, len(turn.expected) + SPARE) for turn in turns]
        short = sum(len(turn.prompt) + n > self._positions for turn, n in zip(turns, wanted, strict=True))
        self._say_short(short, len(turns))
        return [self._text(ids) for ids in self._answers(turns, wanted, self._stops(turns))]

    def asked(self, document: Encoded) -> str:
        """The text before a document's first answer."""
        return self._text(turns_of(document)[0].prompt)

    def expected(self, document: Encoded) -> str:
        """The document's first answer."""
        return self._text(turns_of(document)[0].expected)

    def _text(self, ids: Any) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _stops(self, turns: Sequence[Turn]) -> set[int]:
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ends = {int(turn.expected[-1]) for turn in turns if not turn.last}
        inside = {int(i) for turn in turns for i in np.unique(turn.expected[:-1])}
        return self._stop_ids | ((ends & special) - inside)

    def _is(self, said: list[int], turn: Turn, stops: set[int]) -> bool:
        said_text, wanted = self._text(said).strip(), self._text(turn.expected).strip()
        # A turn that is ended by text, as by a template whose markers are no tokens, ends where that text does.
        return said_text == wanted if int(turn.expected[-1]) in stops else said_text.startswith(wanted)

    def _answers(self, turns: Sequence[Turn], wanted: Sequence[int], stops: set[int]) -> list[list[int]]:
        """The new ids of each turn, at most as many as are wanted and there are positions for."""
        limits = [min(n, self._positions - len(turn.prompt)) for turn, n in zip(turns, wanted, strict=True)]
        base = with_table_on_device(self._parts.base)
        generator = Generator(self._parts.graphdef, self._parts.trained, base, stop_ids=sorted(stops))
        found: list[list[int]] = [[] for _ in turns]
        open_turns = [i for i, limit in enumerate(limits) if limit > 0]
        lengths = [len(turns[i].prompt) for i in open_turns]
        for group in groups(lengths, bucket(max(limits, default=1))):
            rows, filled = ([open_turns[i] for i in indices] for indices in (group.rows, group.filled))
            prompts = [turns[i].prompt.tolist() for i in filled]
            new = generator.generate(prompts, max_new_tokens=[limits[i] for i in filled])
            for i, ids in zip(rows, new, strict=False):
                found[i] = ids
        return found

    def _say_short(self, short: int, total: int) -> None:
        if short:
            announce(f"{short} of {total} answers are shortened: the model's {self._positions} positions end there")


@functools.cache
def announce(text: str) -> None:
    """A warning, the first time that it is met: it would be the same at every evaluation."""
    logger.warning(text)
