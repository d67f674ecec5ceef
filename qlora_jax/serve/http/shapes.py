"""Answers in OpenAI's two shapes, whole and in chunks."""

import abc
import time
import uuid
from collections.abc import Sequence
from typing import Any

from qlora_jax.serve.http.choice import Piece, Placed
from qlora_jax.serve.http.detokenize import TokenTexts
from qlora_jax.serve.http.exchange import Exchange
from qlora_jax.serve.request import Token

Json = dict[str, Any]


class Shape(abc.ABC):
    """How one request is answered.

    Args:
      model: as the request named it.
      texts: of single tokens.
      logprobs: whether to report log probabilities.
    """

    PREFIX: str
    WHOLE: str
    CHUNK: str

    def __init__(self, model: str, texts: TokenTexts, *, logprobs: bool):
        self._texts, self._logprobs = texts, logprobs
        self._head = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, exchange: Exchange, pieces: Sequence[Sequence[Piece]]) -> Json:
        """The answer in one; `pieces` for each choice."""
        choices = [
            {
                "index": index,
                **self._message("".join(piece.text for piece in own)),
                "logprobs": self._scores([placed for piece in own for placed in piece.tokens]),
                "finish_reason": exchange.choices[index].reason,
            }
            for index, own in enumerate(pieces)
        ]
        return {**self._head, "object": self.WHOLE, "choices": choices, "usage": exchange.usage()}

    def chunk(self, index: int, piece: Piece, reason: str | None) -> Json:
        """A part of choice `index`; with a reason its last one."""
        choice = {
            "index": index,
            **self._delta(piece.text),
            "logprobs": self._scores(piece.tokens) if piece.tokens else None,
            "finish_reason": reason,
        }
        return {**self._head, "object": self.CHUNK, "choices": [choice]}

    def counts(self, usage: Json) -> Json:
        """The chunk after the last, for those who asked for it."""
        return {**self._head, "object": self.CHUNK, "choices": [], "usage": usage}

    def opening(self, index: int) -> Json | None:
        """What a choice's stream opens with, if anything."""
        return None

    def _scores(self, tokens: Sequence[Placed]) -> Json | None:
        return self._listed(tokens) if self._logprobs else None

    @abc.abstractmethod
    def _message(self, text: str) -> Json: ...

    @abc.abstractmethod
    def _delta(self, text: str) -> Json: ...

    @abc.abstractmethod
    def _listed(self, tokens: Sequence[Placed]) -> Json: ...


class CompletionShape(Shape):
    """/v1/completions."""

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def _message(self, text: str) -> Json:
        return {"text": text}

    _delta = _message

    def _listed(self, tokens: Sequence[Placed]) -> Json:
        return {
            "tokens": [self._texts.text_of(placed.token.id) for placed in tokens],
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": [self._top(placed.token) for placed in tokens],
            "text_offset": [placed.offset for placed in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one that is there, best first; None where nothing was predicted."""
        if token.logprob is None:
            return None
        likeliest = {self._texts.text_of(i): logprob for i, logprob in reversed(token.top)}
        own = self._texts.text_of(token.id)
        return dict(reversed(likeliest.items())) | ({own: token.logprob} if own not in likeliest else {})


class ChatShape(Shape):
    """/v1/chat/completions."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Json:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {**self._head, "object": self.CHUNK, "choices": [choice]}

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _listed(self, tokens: Sequence[Placed]) -> Json:
        content = [
            {
                **self._one(placed.token.id, placed.token.logprob),
                "top_logprobs": [self._one(i, logprob) for i, logprob in placed.token.top],
            }
            for placed in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> Json:
        raw = self._texts.bytes_of(token)
        return {"token": self._texts.text_of(token), "logprob": logprob, "bytes": list(raw)}
