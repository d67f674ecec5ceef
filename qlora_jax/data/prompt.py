"""A prompt as token ids: raw text, or a chat that the assistant is to continue."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.chat import ChatTemplate
from qlora_jax.data.formats import Chat
from qlora_jax.data.messages import check_unicode, messages_of, options_of, tools_of
from qlora_jax.data.tokenizer import Tokenizer, check_ids


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of raw text with the tokenizer's own special tokens, less the eos that it adds: a prompt is not finished.

    Raises:
        ValueError: half a surrogate pair, which is no Unicode text, or a token that the model does not have.
    """
    check_unicode(text, "the text")
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    check_ids(ids, tokenizer)
    return ids[:-1] if ids and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def chat_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **more: Any) -> list[int]:
    """The ids of `chat_text`, which takes the same arguments."""
    return rendered_ids(chat_text(messages, tokenizer, **more), tokenizer)


def rendered_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of what a template has rendered: it has written bos itself, so the tokenizer must not add another."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_ids(ids, tokenizer)
    return ids


def chat_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> str:
    """A chat in the tokenizer's template, up to where the assistant speaks.

    Args:
        messages, tools: in any form of `messages`, OpenAI's among them.
        options: further variables for the template, such as {"enable_thinking": False}.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        ValueError: there is no chat template, it cannot render these messages or leaves out what they or the tools say,
            or they hold half a surrogate pair, which is no Unicode text, or a token that the model does not have.
    """
    if not (chat_template or tokenizer.chat_template):
        raise ValueError("the model's tokenizer has no chat template: give the prompt as raw text, or --chat-template")
    chat = Chat(
        messages=messages_of(messages, "messages"),
        tools=tools_of(tools, "tools"),
        options=options_of(options, "chat_template_kwargs"),
    )
    return _template(tokenizer, chat_template).render(chat, opens_reply=True).text


@functools.lru_cache(maxsize=4)
def _template(tokenizer: Tokenizer, chat_template: str | None) -> ChatTemplate:
    """One for all chats: it remembers what it has found of the template, which takes two renderings more."""
    return ChatTemplate(tokenizer, chat_template)
