"""From the fields of a request to token ids."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from qlora_jax.data.isolated import TEMPLATE_ERRORS
from qlora_jax.data.prompt import chat_text, rendered_ids, text_ids
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.serve.http.errors import ApiError
from qlora_jax.serve.http.fields import ChatFields, CompletionFields


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that `echo` gives back."""

    ids: tuple[int, ...]
    text: str


def completion_prompts(
    fields: CompletionFields, tokenizer: Tokenizer, vocabulary: int, *, most: int | None = None
) -> list[Prompt]:
    """One or more prompts.

    Args:
      vocabulary: token ids that the model knows.
      most: characters of the longest text that is tokenized.

    Raises:
      ApiError: a prompt is empty or too long, or an id is none of the model's.
    """
    given = fields.prompt
    several = isinstance(given, list) and isinstance(given[0], str | list)
    return [_prompt(one, tokenizer, vocabulary, most) for one in (given if several else [given])]  # type: ignore[union-attr]


def chat_prompt(
    fields: ChatFields, tokenizer: Tokenizer, *, most: int | None = None, render: Callable[..., str] | None = None
) -> Prompt:
    """The chat up to where the assistant speaks.

    Args:
      most: characters of the longest text that is tokenized.
      render: gives the text, from the arguments of `chat_text` without the tokenizer; that function where None.

    Raises:
      ApiError: the text is too long, or the template cannot render it or leaves something out.
    """
    tools = fields.tools if fields.tool_choice != "none" else None
    # What is null within a call's arguments stays.
    messages = [message.model_dump(exclude_unset=True) for message in fields.messages]
    render = render or functools.partial(chat_text, tokenizer=tokenizer)
    try:
        text = render(messages, tools=tools or None, options=fields.chat_template_kwargs)
    except TEMPLATE_ERRORS as error:
        raise ApiError(400, str(error), param="messages") from error
    return Prompt(_ids(text, "messages", most, lambda: rendered_ids(text, tokenizer)), "")


def _prompt(given: Any, tokenizer: Tokenizer, vocabulary: int, most: int | None) -> Prompt:
    if isinstance(given, str):
        ids, text = _ids(given, "prompt", most, lambda: text_ids(given, tokenizer)), given
    else:
        ids = tuple(given)
        wrong = [i for i in ids if i >= vocabulary]
        if wrong:
            raise ApiError(400, f"prompt: {wrong[0]} is no token id: the model has {vocabulary}", param="prompt")
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not ids:
        raise ApiError(400, "prompt has no tokens: give some text", param="prompt")
    return Prompt(ids, text)


def _ids(text: str, param: str, most: int | None, tokenize: Callable[[], Sequence[int]]) -> tuple[int, ...]:
    if most is not None and len(text) > most:
        raise ApiError(
            400,
            f"{param}: {len(text):,} characters are more tokens than a text may have (at most {most:,} characters are "
            "tokenized): shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    try:
        return tuple(tokenize())
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
