"""What the server asks of the engine, and what it hears back. Both sides speak in token ids; text is the server's."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from qlora_jax.generation.sampling import Sampling

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be continued.

    Attributes:
      prompt: token ids, at least one.
      adapter: an adapter's name, None for the bare base.
      max_new_tokens: how many tokens may be drawn; 0 only scores the prompt.
      sampling: how they are drawn.
      seed: the same seed, prompt and adapter draw the same tokens, whatever else is being served.
      top_logprobs: how many of the likeliest tokens to report beside each token; None reports no log probabilities.
      score_prompt: also report every prompt token's log probability.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: str | None = None
    sampling: Sampling = GREEDY
    seed: int = 0
    top_logprobs: int | None = None
    score_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with its log probability (natural, before temperature) and the likeliest ones in its place.

    `logprob` is None where none was asked for, and for a prompt's first token, which nothing predicts.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptScored:
    """Every token of the prompt, scored; comes once, before any new token, where it was asked for."""

    tokens: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of every request. A stop token is never among the tokens.

    `cached` counts the prompt's tokens whose keys and values were still there. `error` says why a request "failed".
    `refused`: it failed because of its adapter, which cannot be served. `token` is the stop token that ended a text,
    where log probabilities were asked for.
    """

    reason: Literal["stop", "length", "cancelled", "failed"]
    cached: int = 0
    error: str = ""
    refused: bool = False
    token: Token | None = None


Event = Token | PromptScored | Finished

# Called on the engine's thread; must return at once.
Listener = Callable[[Event], None]


class Refused(Exception):
    """A request or an adapter that the engine does not take."""


class UnknownModel(Refused):
    """No base and no adapter of that name is served. `reason`: why not, where something of that name is there."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


class TooLong(Refused):
    """Prompt and new tokens exceed what a row holds."""


class QueueFull(Refused):
    """No room for another waiting request. `retry_after`: seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Refused):
    """The engine is shutting down and takes nothing new."""
