"""A request for text on its way through the engine: prompts in, pieces of text out."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.serve.http.choice import Choice, Piece, Placed
from qlora_jax.serve.http.detokenize import Detokenizer
from qlora_jax.serve.http.errors import ApiError
from qlora_jax.serve.http.fields import Generation
from qlora_jax.serve.http.limits import SEEDS
from qlora_jax.serve.http.prompts import Prompt
from qlora_jax.serve.http.running import Run
from qlora_jax.serve.request import Event, Finished, PromptScored, Request, Token

# Gives requests to the engine, whose events then come to the returned Run.
Submit = Callable[[Sequence[Request]], Run]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request asks of the engine, the same for each of its prompts.

    `seed` is that of the first choice of a prompt; the following ones count up. `lists_end`: the token that ended the
    text is listed among the scored ones.
    """

    adapter: str | None
    max_new_tokens: int | None
    seed: int
    top_logprobs: int | None = None
    echo: bool = False
    lists_end: bool = False


class Exchange:
    """Submits `n` requests for each prompt and follows them; choice i belongs to prompt i // n.

    Args:
      room: the tokens that a slot holds.

    Raises:
      Refused, ValueError: what the engine does not take.
    """

    def __init__(
        self,
        submit: Submit,
        tokenizer: Tokenizer,
        fields: Generation,
        prompts: Sequence[Prompt],
        wanted: Wanted,
        room: int,
    ):
        self.fields, self.wanted, self.prompts = fields, wanted, prompts
        self._tokenizer, self._n = tokenizer, fields.n or 1
        self._of = [prompt for prompt in prompts for _ in range(self._n)]
        self.choices = [
            Choice(tokenizer, prompt.ids, fields.stops, echoed=len(prompt.text) if wanted.echo else 0)
            for prompt in self._of
        ]
        self.run = submit([self._request(i, room) for i in range(len(self._of))])

    def _request(self, index: int, room: int) -> Request:
        wanted, prompt = self.wanted, self._of[index].ids
        # A prompt that leaves no room is refused by the engine, which says so.
        most = max(1, room - len(prompt)) if wanted.max_new_tokens is None else wanted.max_new_tokens
        return Request(
            prompt=prompt,
            adapter=wanted.adapter,
            max_new_tokens=most,
            sampling=self.fields.sampling,
            seed=(wanted.seed + index % self._n) % SEEDS,
            top_logprobs=wanted.top_logprobs,
            score_prompt=self._scores_prompt,
        )

    @property
    def _scores_prompt(self) -> bool:
        """Also where nothing is generated: the engine does nothing else then."""
        return self.wanted.echo and (self.wanted.top_logprobs is not None or self.wanted.max_new_tokens == 0)

    async def begun(self) -> None:
        """Waits for what the engine says first.

        Raises:
          ApiError: it gave up before the first token.
        """
        event = await self.run.first()
        if isinstance(event, Finished) and event.reason in ("cancelled", "failed"):
            raise _failure(event)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index, piece) as they come; a choice is complete with the first piece that finds its `reason` set.

        Raises:
          ApiError: the engine gave up on one of them.
        """
        if self.wanted.echo and not self._scores_prompt:
            for index, prompt in enumerate(self._of):
                yield index, Piece(prompt.text)
        async for index, event in self.run.events():
            choice = self.choices[index]
            if piece := self._piece(index, choice, event):
                yield index, piece
            if choice.reason and not isinstance(event, Finished):
                self.run.stop(index)

    def _piece(self, index: int, choice: Choice, event: Event) -> Piece:
        match event:
            case Token():
                return choice.push(event)
            case PromptScored():
                return self._echo(self._of[index], event)
            case Finished(reason="stop" | "length"):
                return choice.finish(event, lists_end=self.wanted.lists_end)
            case Finished(reason="cancelled") if choice.reason:
                return choice.finish(event)
            case Finished():
                raise _failure(event)

    def _echo(self, prompt: Prompt, scored: PromptScored) -> Piece:
        """The prompt with its tokens in their places."""
        detokenizer, offset, tokens = Detokenizer(self._tokenizer), 0, list[Placed]()
        for token in scored.tokens:
            tokens.append(Placed(token, min(offset, len(prompt.text))))
            offset += len(detokenizer.push(token.id))
        return Piece(prompt.text, tuple(tokens))

    def usage(self) -> dict[str, Any]:
        """Counts of tokens. A prompt counts once, however many choices it has."""
        given = sum(len(prompt.ids) for prompt in self.prompts)
        drawn = sum(choice.generated for choice in self.choices)
        cached = sum(choice.cached for choice in self.choices[:: self._n])
        return {
            "prompt_tokens": given,
            "completion_tokens": drawn,
            "total_tokens": given + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _failure(event: Finished) -> ApiError:
    """The answer to a request that did not come to its own end."""
    if event.reason == "cancelled":
        return ApiError(503, "the server stopped this request because it is shutting down", code="shutting_down")
    if event.refused:
        return ApiError(400, f"this model cannot be served: {event.error}", param="model", code="model_not_servable")
    return ApiError(500, f"the generation failed: {event.error}")
