"""From the fields of a request to token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qlora_jax.data.prompt import chat_ids, text_ids
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.serve.http.errors import ApiError
from qlora_jax.serve.http.fields import ChatFields, CompletionFields

# What a template may raise over messages and tools that it does not expect.
TEMPLATE_ERRORS = (ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that `echo` gives back."""

    ids: tuple[int, ...]
    text: str


def completion_prompts(fields: CompletionFields, tokenizer: Tokenizer, vocabulary: int) -> list[Prompt]:
    """One or more prompts. Raises ApiError where one has no tokens or an id is none of the model's."""
    given = fields.prompt
    several = isinstance(given, list) and isinstance(given[0], str | list)
    return [_prompt(one, tokenizer, vocabulary) for one in (given if several else [given])]  # type: ignore[union-attr]


def chat_prompt(fields: ChatFields, tokenizer: Tokenizer) -> Prompt:
    """The chat up to where the assistant speaks. Raises ApiError where the template cannot render it."""
    tools = fields.tools if fields.tool_choice != "none" else None
    try:
        messages = [message.for_template() for message in fields.messages]
        return Prompt(tuple(chat_ids(messages, tokenizer, tools=tools or None)), "")
    except TEMPLATE_ERRORS as error:
        raise ApiError(400, str(error), param="messages") from error


def _prompt(given: Any, tokenizer: Tokenizer, vocabulary: int) -> Prompt:
    if isinstance(given, str):
        ids: Sequence[int] = _ids(given, tokenizer)
        text = given
    else:
        ids = given
        wrong = [i for i in ids if i >= vocabulary]
        if wrong:
            raise ApiError(400, f"prompt: {wrong[0]} is no token id: the model has {vocabulary}", param="prompt")
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not ids:
        raise ApiError(400, "prompt has no tokens: give some text", param="prompt")
    return Prompt(tuple(ids), text)


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return text_ids(text, tokenizer)
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from error
