"""A loaded model that continues texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

from qlora_jax.data.prompt import chat_ids, text_ids
from qlora_jax.generation import Generator, Sampling
from qlora_jax.run.groups import groups
from qlora_jax.training.step import Parts


class SamplingOptions(TypedDict, total=False):
    """The fields of Sampling."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How texts are continued.

    Attributes:
      chat: each prompt is a user's message, and put into the chat template; else it is raw text.
      max_new_tokens: at most as many are written for each.
      seed: where tokens are drawn, the same one draws the same.
    """

    chat: bool = False
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was written after a prompt: its text without special tokens, and its token ids without the stop token."""

    text: str
    tokens: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextModel:
    """A model taken apart for jit, with its tokenizer. `load` gives one.

    Attributes:
      stop_ids: tokens that end a text.
      max_position: how long a text may become, prompt and answer together.
    """

    parts: Parts
    tokenizer: Any
    stop_ids: tuple[int, ...]
    max_position: int

    @overload
    def generate(
        self,
        prompts: str,
        *,
        chat: bool = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: list[str],
        *,
        chat: bool = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> list[str]: ...

    def generate(
        self,
        prompts: str | list[str],
        *,
        chat: bool = False,
        max_new_tokens: int = 128,
        seed: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """The continuation of a prompt, or of each of several. The other arguments are those of Writing and Sampling.

        The first call with so many prompts of such a length (to a power of two) and this `max_new_tokens` compiles.

        Raises:
          ValueError: a prompt that does not fit the model's positions or tokens, or a value that cannot be.
        """
        how = Writing(chat=chat, max_new_tokens=max_new_tokens, seed=seed, sampling=Sampling(**sampling))
        found = self.continuations([prompts] if isinstance(prompts, str) else prompts, how)
        return found[0].text if isinstance(prompts, str) else [one.text for one in found]

    def continuations(self, prompts: Sequence[str], how: Writing) -> list[Continuation]:
        """What is written after each prompt. Raises ValueError as `generate` does."""
        ids = [self._prompt_ids(prompt, how) for prompt in prompts]
        generator = Generator(self.parts.graphdef, self.parts.trained, self.parts.base, stop_ids=self.stop_ids)
        found: dict[int, Continuation] = {}
        for number, group in enumerate(groups([len(prompt) for prompt in ids], how.max_new_tokens)):
            tokens = generator.generate(
                [ids[i] for i in group.filled],
                max_new_tokens=how.max_new_tokens,
                sampling=how.sampling,
                seed=how.seed + number,
            )
            for i, new in zip(group.rows, tokens, strict=False):
                found[i] = Continuation(text=self.tokenizer.decode(new, skip_special_tokens=True), tokens=new)
        return [found[i] for i in range(len(ids))]

    def _prompt_ids(self, prompt: str, how: Writing) -> list[int]:
        ids = prompt_ids(self.tokenizer, prompt, chat=how.chat)
        if len(ids) + how.max_new_tokens > self.max_position:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and --max-new-tokens {how.max_new_tokens} exceed the model's "
                f"{self.max_position} positions: shorten one of them"
            )
        return ids


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of raw text with the tokenizer's own special tokens, or of a user's message in the chat template."""
    if not chat:
        return text_ids(prompt, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat: the model's tokenizer has no chat template: give one with --chat-template FILE (or chatml), or "
            "leave --chat out and format the prompt"
        )
    return chat_ids([{"role": "user", "content": prompt}], tokenizer)
