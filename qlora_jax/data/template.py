"""From an example to token ids and the loss mask."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.chat import ChatTemplate, Span, context_spans, ending_spans, is_learned, learned_spans
from qlora_jax.data.formats import Chat, Completion, Example, Text
from qlora_jax.data.tokenizer import Tokenizer, check_ids

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


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A document before it is tokenized.

    learned: the spans of characters that are learned. specials: whether the tokenizer puts its own special tokens
    around the text (templates write them themselves). ends: whether eos is to follow, where the text does not end with
    it. may_end: the spans, each with a learned part, in which a special token may end it and is learned too.
    """

    text: str
    learned: Sequence[Span]
    specials: bool
    ends: bool
    may_end: Sequence[Span] = ()


class Tokens(NamedTuple):
    """A tokenized text: ids `[T]`, which of them the tokenizer added to the text `[T]`, and the characters that each
    stands for `[T]` (none of a slow tokenizer)."""

    ids: list[int]
    added: Sequence[int]
    offsets: Sequence[Span]


class Encoder:
    """Examples to ids and masks, by one tokenizer and one chat template.

    Args:
        tokenizer: a transformers tokenizer (fast, for chats).
        train_on: "completions" scores completions and assistant turns, "all" every token but the first.
        template: for chats; None where there is none.

    Raises:
        ValueError: no eos token, or a bad setting.
    """

    def __init__(self, tokenizer: Tokenizer, *, train_on: TrainOn, template: ChatTemplate | None) -> None:
        if train_on not in ("completions", "all"):
            raise ValueError(f'data.train_on={train_on!r} must be "completions" or "all"')
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token, so nothing would teach the model to stop; set eos_token in its "
                "tokenizer_config.json"
            )
        self._tokenizer, self._train_on, self._template = tokenizer, train_on, template
        named = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special, self._special_ids = tuple(named), frozenset(named.values())

    def draft(self, example: Example) -> Draft:
        """The text to tokenize and what is learned of it. ValueError: the template cannot, or nothing is learned."""
        everything = self._train_on == "all"
        match example:
            case Text(text=text):
                if not text:
                    raise ValueError("the text is empty: there is nothing to learn")
                return Draft(text=text, learned=[(0, len(text))], specials=True, ends=True)
            case Completion(prompt=prompt, completion=completion):
                start, text = len(prompt), prompt + completion
                if not completion:
                    raise ValueError("the completion is empty: there is nothing to learn")
                return Draft(text=text, learned=[(0 if everything else start, len(text))], specials=True, ends=True)
            case Chat():
                return self._draft_chat(example, everything)

    def tokenize(self, drafts: Sequence[Draft]) -> list[Tokens]:
        """The tokens of each draft's text; a fast tokenizer takes them together, on all cores."""
        found: dict[int, Tokens] = {}
        for specials in (True, False):
            chosen = [i for i, draft in enumerate(drafts) if draft.specials is specials]
            found |= zip(chosen, self._tokenized([drafts[i].text for i in chosen], specials), strict=True)
        return [found[i] for i in range(len(drafts))]

    def encode(self, draft: Draft, tokens: Tokens) -> tuple[Sequence[int], NDArray[np.bool_]]:
        """The ids `[T]` and which are scored `[T]`, uncut. ValueError: a token that the model does not have."""
        scored = self._overlap(draft, tokens)
        if draft.may_end:
            _learn_ends(scored, draft, tokens, self._special_ids)
        eos = self._tokenizer.eos_token_id
        kept = _written_once(tokens, self._tokenizer.bos_token_id, eos)
        ids, scored = tokens.ids[kept], scored[kept]
        if draft.ends and not (ids and ids[-1] == eos):
            ids, scored = [*ids, eos], np.append(scored, True)
        elif draft.ends:
            scored[-1] = True
        scored[:1] = False
        check_ids(ids, self._tokenizer)
        return ids, scored

    def _tokenized(self, texts: list[str], specials: bool) -> list[Tokens]:
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            batch = self._tokenizer(texts, add_special_tokens=specials, return_special_tokens_mask=True, verbose=False)
            pairs = zip(batch["input_ids"], batch["special_tokens_mask"], strict=True)
            return [Tokens(ids, added, []) for ids, added in pairs]
        backend = self._tokenizer.backend_tokenizer  # transformers' own call turns each text into an object of its own
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch(texts, add_special_tokens=specials)
        return [Tokens(one.ids, one.special_tokens_mask, one.offsets) for one in encodings]

    def _draft_chat(self, chat: Chat, everything: bool) -> Draft:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)  # which says that there is none
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{type(self._tokenizer).__name__} is a slow tokenizer and gives no character offsets to find the "
                'assistant\'s tokens by; give the rows as {"prompt", "completion"}, or convert it to a '
                "tokenizer.json"
            )
        rendered = self._template.render(chat)
        text, last = rendered.text, len(chat.messages) - 1
        if everything:
            spans = _complement(context_spans(chat, rendered), len(text))
        else:
            spans = learned_spans(chat, rendered, self._template, self._special)
        ends = is_learned(chat, last) and not text.rstrip().endswith(self._tokenizer.eos_token)
        if ends and not everything:
            # The model must get from its last turn's end to the eos that is appended.
            spans = [*spans[:-1], (spans[-1][0], len(text))]
        return Draft(text=text, learned=spans, specials=False, ends=ends, may_end=ending_spans(chat, rendered))

    def _overlap(self, draft: Draft, tokens: Tokens) -> NDArray[np.bool_]:
        """Whether each token holds a character that is learned: bool `[T]`."""
        if self._tokenizer.is_fast:
            return _overlaps(tokens, draft.learned)
        # A slow tokenizer: what differs from the ids of the prompt alone is learned.
        start = draft.learned[0][0]
        given = self._tokenizer(draft.text[:start], verbose=False)["input_ids"] if start else []
        shared = next((k for k, (a, b) in enumerate(zip(given, tokens.ids, strict=False)) if a != b), len(given))
        return np.arange(len(tokens.ids)) >= shared


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
    check_length(seq_len)
    template = ChatTemplate(tokenizer, chat_template) if isinstance(example, Chat) else None
    encoder = Encoder(tokenizer, train_on=train_on, template=template)
    draft = encoder.draft(example)
    ids, scored = encoder.encode(draft, encoder.tokenize([draft])[0])
    return Encoded(ids=np.array(ids[:seq_len], np.int32), scored=scored[:seq_len], cut=len(ids) > seq_len)


def check_length(seq_len: int) -> None:
    if seq_len < 2:
        raise ValueError(f"train.seq_len={seq_len} must be at least 2: a token and the one it predicts")


def _complement(spans: Sequence[Span], length: int) -> list[Span]:
    """What the spans leave of `length` characters."""
    borders = [0, *(border for span in spans for border in span), length]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _overlaps(tokens: Tokens, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Whether each token holds a character of some span: bool `[T]`."""
    scored, count = np.zeros(len(tokens.ids), np.bool_), len(tokens.ids)
    if count and tokens.added[-1]:
        count -= 1  # an eos that the tokenizer adds stands nowhere in the text
    for begin, stop in spans:
        first = bisect.bisect_right(tokens.offsets, begin, 0, count, key=lambda offset: offset[1])
        last = bisect.bisect_left(tokens.offsets, stop, first, count, key=lambda offset: offset[0])
        scored[first:last] = True
    return scored


def _learn_ends(scored: NDArray[np.bool_], draft: Draft, tokens: Tokens, special: frozenset[int]) -> None:
    """Also learn a special token that follows a turn which no special token has ended; in place.

    Many templates close their `{% generation %}` block before the token that ends the turn, or leave it to the next
    turn to show the end; a model must learn it to stop.
    """
    ids, offsets = tokens.ids, tokens.offsets
    for end in (np.flatnonzero(scored[:-1] & ~scored[1:]) + 1).tolist():
        last = end - 1
        while last and draft.text[slice(*offsets[last])].isspace():
            last -= 1
        within = bisect.bisect_right(draft.may_end, (offsets[last][0], len(draft.text))) - 1
        inside = within >= 0 and offsets[end][0] < draft.may_end[within][1]
        if inside and ids[last] not in special and ids[end] in special:
            scored[end] = True


def _written_once(tokens: Tokens, bos: int | None, eos: int) -> slice:
    """The tokens without a bos that the text has already, and without the eos that the tokenizer adds."""
    ids, several = tokens.ids, len(tokens.ids) > 1
    double = several and ids[0] == ids[1] == bos
    eos_added = several and tokens.added[-1] and ids[-1] == eos
    return slice(int(double), len(ids) - int(eos_added))
