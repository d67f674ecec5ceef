"""A prompt as token ids: raw text, or a chat that the assistant is to continue."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.chat import render_for_reply
from qlora_jax.data.formats import Chat
from qlora_jax.data.tokenizer import Tokenizer


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of raw text with the tokenizer's own special tokens, less an eos at the end: a prompt is not finished.

    Raises:
        ValueError: half a surrogate pair, which is no Unicode text.
    """
    _check_unicode(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def chat_ids(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """The ids of a chat in the tokenizer's template, up to where the assistant speaks.

    Raises:
        ValueError: the tokenizer has no chat template, the template cannot render these messages, or they hold half a
            surrogate pair, which is no Unicode text.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: give the prompt as raw text")
    rendered = render_for_reply(Chat(messages=messages, tools=tools), tokenizer)
    _check_unicode(rendered)
    # The template has written bos itself, so the tokenizer must not add another.
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


def _check_unicode(text: str) -> None:
    """JSON can hold what UTF-8 cannot, and tokenizers say of it only that it is of the wrong type."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half a surrogate pair, which is no Unicode"
        ) from error
