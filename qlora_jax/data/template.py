"""From an example to token ids and the loss mask."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.chat import has_chat_template, tokenize_chat
from qlora_jax.data.formats import Chat, Completion, Example, Text, to_example
from qlora_jax.data.sources import Row
from qlora_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TrainOn = Literal["completions", "all"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """One document, at most seq_len long.

    ids: int32 `[T]`. scored: bool `[T]`, True where that token is a label, predicted from those before it; so
    never at 0. cut: whether the document was longer and lost its end.
    """

    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]
    cut: bool = False


def encode(
    example: Example,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    train_on: TrainOn = "completions",
    chat_template: str | None = None,
) -> Encoded:
    """Ids and loss mask of one example, cut to `seq_len` tokens.

    The mask comes from positions, never from ids: eos is learned also where it doubles as the padding token.

    Args:
        example: text, completion or chat.
        tokenizer: a transformers tokenizer (fast, for chats).
        seq_len: the most tokens kept, ≥ 2.
        train_on: "completions" scores completions and assistant turns, "all" every token but the first.
        chat_template: Jinja text that replaces the tokenizer's own template (see `load_chat_template`).

    Raises:
        ValueError: no eos token, no usable chat template, or a bad setting.
    """
    if seq_len < 2:
        raise ValueError(f"train.seq_len={seq_len} must be at least 2: a token and the one it predicts")
    if train_on not in ("completions", "all"):
        raise ValueError(f'data.train_on={train_on!r} must be "completions" or "all"')
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, so nothing would teach the model to stop; set eos_token in its "
            "tokenizer_config.json"
        )
    ids, learned = _tokenize(example, tokenizer, chat_template, completions_only=train_on == "completions")
    scored = np.array(learned, np.bool_)
    scored[0] = False
    return Encoded(ids=np.array(ids[:seq_len], np.int32), scored=scored[:seq_len], cut=len(ids) > seq_len)


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    train_on: TrainOn = "completions",
    chat_template: str | None = None,
) -> Sequence[Encoded]:
    """`encode` over rows, in order, less those without a scored token; logs how many were cut or left out.

    Raises:
        ValueError: a bad row (the message opens with its file and row number), or no row has a scored token.
    """
    as_chat = has_chat_template(tokenizer, chat_template)
    encoded = []
    for row in rows:
        example = to_example(row, alpaca_as_chat=as_chat)
        try:
            one = encode(example, tokenizer, seq_len=seq_len, train_on=train_on, chat_template=chat_template)
        except ValueError as error:
            raise ValueError(f"{row.origin}: {error}") from error
        encoded.append(one)
    kept = [one for one in encoded if one.scored.any()]
    _report(encoded, kept, seq_len)
    return kept


def _report(encoded: Sequence[Encoded], kept: Sequence[Encoded], seq_len: int) -> None:
    total, cut, lost = len(encoded), sum(one.cut for one in encoded), len(encoded) - len(kept)
    if not kept:
        raise ValueError(
            f"none of the {total} rows has a scored token within train.seq_len={seq_len} ({cut} were longer "
            "and cut); raise train.seq_len or check that the rows hold completions"
        )
    if cut:
        logger.warning(
            f"{cut} of {total} rows are longer than train.seq_len={seq_len} and were cut; raise it to keep them whole"
        )
    if lost:
        logger.warning(f"{lost} of {total} rows have no scored token within train.seq_len={seq_len} and were left out")


def _tokenize(
    example: Example, tokenizer: Tokenizer, chat_template: str | None, *, completions_only: bool
) -> tuple[list[int], list[bool]]:
    """All ids `[T]`, uncut, and whether each is learned."""
    eos = tokenizer.eos_token_id
    match example:
        case Text(text=text):
            ids = [*_ids_with_specials(text, tokenizer), eos]
            return ids, [True] * len(ids)
        case Completion(prompt=prompt, completion=completion):
            given = _ids_with_specials(prompt, tokenizer)
            learned = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], eos]
            return given + learned, [not completions_only] * len(given) + [True] * len(learned)
        case Chat():
            return tokenize_chat(example, tokenizer, chat_template, assistant_only=completions_only)


def _ids_with_specials(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids with the tokenizer's own special tokens, less an eos at the end: the caller places it."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    added_eos = len(ids) > 1 and special[-1] and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if added_eos else ids
