"""A request on its way through the engine, and the rows of the cache that requests take."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.serve.adapters.store import Want
from qlora_jax.serve.request import Event, Finished, Listener, PromptScored, Request, Token
from qlora_jax.serve.runner import Piece

# What a row was computed with where no adapter was.
BASE = "base"


@dataclasses.dataclass(eq=False)
class Job:
    """A request, who listens, and how far it has come.

    Attributes:
      want: the adapter that the request waits for; None for the base.
      cancelled: set from any thread; the engine looks at it between steps.
      slot: the adapter's place in the stacks.
      cached: tokens of the prompt that were in the cache already.
      pieces: what is still to be read of the prompt.
      scores: the prompt's tokens, where they are asked for.
      drawn: how many new tokens there are. last: the last of them.
      ahead: how many more are being drawn, 1 at most between two steps.
      began: when it got its row.
    """

    request: Request
    listener: Listener
    want: Want | None
    cancelled: bool = False
    slot: int = 0
    cached: int = 0
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    scores: list[Token] = dataclasses.field(default_factory=list)
    drawn: int = 0
    last: int = 0
    ahead: int = 0
    began: float = 0.0

    @property
    def prompt(self) -> np.ndarray:
        """The prompt's ids as int32."""
        return np.asarray(self.request.prompt, np.int32)

    @property
    def writes(self) -> bool:
        """Whether it has its first token, and still a token to draw that is not being drawn."""
        return self.drawn > 0 and self.drawn + self.ahead < self.request.max_new_tokens

    def tell(self, event: Event) -> None:
        """Hands an event on. A listener that raises hears no more: nobody else's request shall suffer for it."""
        try:
            self.listener(event)
        except Exception:  # whatever a listener does wrong
            self.cancelled, self.listener = True, _deaf


def _deaf(event: Event) -> None:
    pass


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the cache.

    Attributes:
      key: the content hash of the adapter, or BASE, that it was computed with.
      tokens: exactly what the cache holds there: as keys and values, and as states after the last of them.
      job: whose turn it is; None where the row is free. What is there stays for the next that begins alike.
      used: counts on with every use.
    """

    index: int
    key: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    job: Job | None = None
    used: int = 0

    def shared(self, key: str, prompt: Sequence[int], *, cuts: bool) -> int:
        """How many of a prompt's first tokens are there already; with `cuts` false none if there are others behind."""
        if key != self.key:
            return 0
        same = 0
        for own, other in zip(self.tokens, prompt, strict=False):
            if own != other:
                break
            same += 1
        return same if cuts or same == len(self.tokens) else 0


def best_row(free: Sequence[Row], key: str, prompt: Sequence[int], *, cuts: bool) -> tuple[Row, int]:
    """The free row that shares most with a prompt, else the one that was used longest ago; and how much it shares.

    At least one token is left to be read: its hidden state gives the next one.

    Args:
      cuts: whether a row can be cut back to its first tokens: keys and values can, a state cannot.
    """
    shared = {row.index: row.shared(key, prompt[:-1], cuts=cuts) for row in free}
    row = max(free, key=lambda row: (shared[row.index], -row.used))
    return row, shared[row.index]


def prompt_scored(job: Job) -> PromptScored:
    """The event of a scored prompt: nothing predicts its first token."""
    return PromptScored((Token(job.request.prompt[0]), *job.scores))


def cancelled(job: Job) -> Finished:
    return Finished("cancelled", job.cached)
