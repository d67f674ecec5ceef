"""One answer: what the engine's events become on their way out."""

import dataclasses
from collections.abc import Sequence

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.serve.http.detokenize import Detokenizer
from qlora_jax.serve.http.stops import StopFinder
from qlora_jax.serve.request import Finished, Token


@dataclasses.dataclass(frozen=True)
class Placed:
    """A token and where its text begins, in characters of the answer."""

    token: Token
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that begin in it."""

    text: str = ""
    tokens: tuple[Placed, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Choice:
    """Follows one answer.

    Args:
      tokenizer: a transformers tokenizer.
      prompt: token ids; they are not searched for stop strings.
      stops: strings that end the answer and are no part of it.
      echoed: characters of the prompt that stand before the answer.

    Attributes:
      reason: "stop" or "length" once the answer is complete, before that None.
      generated: tokens drawn, those of a stop string included.
      cached: tokens of the prompt that were not read again.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], *, echoed: int = 0):
        self._detokenizer, self._finder = Detokenizer(tokenizer, prompt), StopFinder(stops)
        self._decoded = self._sent = echoed
        self._waiting: list[Placed] = []
        self.reason: str | None = None
        self.generated = self.cached = 0

    def push(self, token: Token) -> Piece:
        """What a new token adds; nothing after a stop string."""
        if self.reason:
            return Piece()
        self.generated += 1
        self._waiting.append(Placed(token, self._decoded))
        return self._pass_on(self._detokenizer.push(token.id))

    def finish(self, event: Finished, *, lists_end: bool = False) -> Piece:
        """What is left at the end; with `lists_end` also the token that ended the text, which has none itself."""
        self.cached = event.cached
        if self.reason:
            return Piece()
        piece = self._pass_on(self._detokenizer.finish())
        if self.reason:
            return piece
        self.reason = "length" if event.reason == "length" else "stop"
        ended = (Placed(event.token, self._decoded),) if event.token and lists_end else ()
        return Piece(piece.text + self._finder.finish(), (*piece.tokens, *self._waiting, *ended))

    def _pass_on(self, text: str) -> Piece:
        self._decoded += len(text)
        certain = self._finder.push(text)
        self._sent += len(certain)
        begun = tuple(placed for placed in self._waiting if placed.offset < self._sent)
        self._waiting = self._waiting[len(begun) :]
        if self._finder.stopped:
            self.reason = "stop"
        return Piece(certain, begun)
