"""A chat as token ids, and which of them the assistant said.

The template decides the text. The assistant's part of it is found from `{% generation %}` blocks where the
template has them, and otherwise by rendering the conversation up to each assistant turn, without and with it:
what the turn added is what the assistant said. Characters become tokens through the tokenizer's offsets.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from qlora_jax.data.formats import Chat
from qlora_jax.data.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # characters [start, end)


def load_chat_template(name: str | None) -> str | None:
    """The Jinja text of `data.chat_template`: built in ("chatml") or a file; None keeps the tokenizer's.

    Raises:
        FileNotFoundError: neither a built-in name nor a file.
    """
    if name is None:
        return None
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"data.chat_template={name!r} is neither a file nor a built-in template ({', '.join(BUILT_IN)})"
        )
    return path.read_text(encoding="utf-8")


def has_chat_template(tokenizer: Tokenizer, chat_template: str | None) -> bool:
    return bool(chat_template or tokenizer.chat_template)


def tokenize_chat(
    chat: Chat, tokenizer: Tokenizer, chat_template: str | None, *, assistant_only: bool
) -> tuple[list[int], list[bool]]:
    """Ids `[T]` and which are learned: all, or what the assistant said and the tokens that end its turns.

    A conversation that ends with the assistant ends with eos, which is appended if the template left it out.

    Raises:
        ValueError: no template, one that fails or hides where the turns lie, or no assistant turn to learn.
    """
    _check(chat, tokenizer, chat_template, assistant_only)
    template = tokenizer.get_chat_template(chat_template, tools=chat.tools)
    text = _render(chat, tokenizer, template)
    # The template has written bos itself, so the tokenizer must not add another.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    if not assistant_only:
        learned = [True] * len(ids)
    elif GENERATION_BLOCK.search(template):
        learned = _said_by_blocks(chat, tokenizer, template)
    else:
        learned = _overlaps(encoded["offset_mapping"], _turn_spans(chat, tokenizer, template, text)).tolist()
    if chat.messages[-1]["role"] == "assistant" and not text.rstrip().endswith(tokenizer.eos_token):
        return [*ids, tokenizer.eos_token_id], [*_up_to_the_end(chat, learned), True]
    return ids, learned


def render_for_reply(chat: Chat, tokenizer: Tokenizer) -> str:
    """The chat in the tokenizer's own template, up to where the assistant speaks.

    Raises:
        ValueError: the template cannot render these messages.
    """
    template = tokenizer.get_chat_template(None, tools=chat.tools)
    return _render(chat, tokenizer, template, add_generation_prompt=True)


def _check(chat: Chat, tokenizer: Tokenizer, chat_template: str | None, assistant_only: bool) -> None:
    roles = [message["role"] for message in chat.messages]
    if not has_chat_template(tokenizer, chat_template):
        raise ValueError(
            "chat rows need a chat template and the tokenizer has none; set data.chat_template to the path "
            f"of a Jinja file or to a built-in one ({', '.join(BUILT_IN)})"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets to find the "
            'assistant\'s tokens by; give the rows as {"prompt", "completion"}, or convert it to a '
            "tokenizer.json"
        )
    if assistant_only and "assistant" not in roles:
        raise ValueError(f'no "assistant" message to learn from (the roles are {", ".join(roles)})')
    if assistant_only and roles[0] == "assistant":
        raise ValueError('the chat opens with an "assistant" message; put the "user" message before it')


def _render(
    chat: Chat,
    tokenizer: Tokenizer,
    template: str,
    *,
    until: int | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of the messages before message `until` (default: of all)."""
    messages: list[Mapping[str, Any]] = list(chat.messages[:until])
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=chat.tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template cannot render messages of the roles {roles}: {error}") from error


def _up_to_the_end(chat: Chat, learned: list[bool]) -> list[bool]:
    """Also learn what stands between the last turn and an appended eos, or the model never gets there."""
    if not chat.messages[-1].get("content"):
        return learned  # the last learned token may belong to an earlier turn
    last = max(i for i, yes in enumerate(learned) if yes)
    return learned[:last] + [True] * (len(learned) - last)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _said_by_blocks(chat: Chat, tokenizer: Tokenizer, template: str) -> list[bool]:
    encoded = tokenizer.apply_chat_template(
        list(chat.messages),
        tools=chat.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    said = [bool(yes) for yes in encoded["assistant_masks"]]
    if not any(said):
        raise ValueError("the chat template's {% generation %} blocks hold no assistant text; check data.chat_template")
    # Many templates close the block before the token that ends the turn; a model must learn that one to stop.
    special = set(_special_tokens(tokenizer).values())
    ids = encoded["input_ids"]
    ends = [said[t - 1] and ids[t] in special and ids[t - 1] not in special for t in range(1, len(ids))]
    return [inside or end for inside, end in zip(said, [False, *ends], strict=True)]


def _turn_spans(chat: Chat, tokenizer: Tokenizer, template: str, text: str) -> list[Span]:
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    spans = [_turn_span(i, chat, tokenizer, template, text) for i in turns]
    special = tuple(_special_tokens(tokenizer))
    return [(start, _without_layout(text, start, end, special)) for start, end in spans]


def _without_layout(text: str, start: int, end: int, special: tuple[str, ...]) -> int:
    """Where the turn ends: at a special token if only white space follows it in the turn, which is layout."""
    said = text[start:end].rstrip()
    return start + len(said) if said.endswith(special) else end


def _turn_span(i: int, chat: Chat, tokenizer: Tokenizer, template: str, text: str) -> Span:
    """The characters that message `i`, an assistant turn, added to `text`, the whole conversation."""
    before = _render(chat, tokenizer, template, until=i, add_generation_prompt=True)
    after = _render(chat, tokenizer, template, until=i + 1)
    said = ""
    if text.startswith(before) and after.startswith(before):
        said = _common_turn(after[len(before) :], text[len(before) :], chat.messages[i].get("content", ""))
    if not said:
        raise ValueError(
            f"the chat template is not prefix-consistent: it writes messages[{i}] or what precedes it "
            "differently as a prompt, as the last turn or in the whole chat, so the assistant's tokens "
            "cannot be told apart; set data.chat_template to a template with {% generation %} blocks around "
            'them, or give the rows as {"prompt", "completion"}'
        )
    return len(before), len(before) + len(said)


def _common_turn(turn: str, rest: str, content: str) -> str:
    """The longest tail of `turn` (as rendered last) that `rest` (the whole chat from there) opens with.

    Usually all of it. Reasoning templates (Qwen3) put an empty think block before the last turn only, so that
    an earlier turn is a proper tail; it must hold the content, or the match is an accident.
    """
    if rest.startswith(turn):
        return turn
    tail = next((turn[k:] for k in range(1, len(turn)) if rest.startswith(turn[k:])), "")
    return tail if content.strip() and content.strip() in tail else ""


def _overlaps(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Whether each token holds a character of some span: bool `[T]`."""
    starts, ends = np.array(offsets).reshape(-1, 2).T
    return np.logical_or.reduce([(starts < stop) & (ends > begin) for begin, stop in spans])
