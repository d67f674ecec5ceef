"""A chat template at work: the chat as text, what each message became, and what the template left out."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from qlora_jax.data.chat.marks import Rendered, marked, render
from qlora_jax.data.chat.said import FORMS, Claim, Form, Shape, left_out, shape_of, stand_in
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
Finding = tuple[Form, list[Claim]]  # the form that a template reads, and what it leaves out even so
MOST_SHAPES = 4096  # remembered: who asks a server may choose variables for its template, and so make new ones
TODAY = "strftime_now"  # the function by which templates write the date


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


class ChatTemplate:
    """The tokenizer's chat template, or the one given in its place.

    Templates differ in the form that they read (`said.FORMS`); the first one that leaves nothing out is found once for
    each shape of chat, with words that stand in for its own.
    """

    def __init__(self, tokenizer: Tokenizer, given: str | None = None, today: datetime | None = None) -> None:
        """today: the date that the template is told, where it asks for one; None is the clock's."""
        if not has_chat_template(tokenizer, given):
            raise ValueError(
                "chat rows need a chat template and the tokenizer has none; set data.chat_template to the path "
                f"of a Jinja file or to a built-in one ({', '.join(BUILT_IN)})"
            )
        self._tokenizer, self._given, self._today = tokenizer, given, today
        self._findings: dict[Shape, Finding] = {}
        self._openings: dict[Shape, str] = {}

    def source(self, chat: Chat) -> str:
        """The Jinja text that is used for the chat: tokenizers may have one of its own for chats with tools."""
        return self._tokenizer.get_chat_template(self._given, tools=chat.tools)

    def render(self, chat: Chat, *, opens_reply: bool = False) -> Rendered:
        """The chat as the template writes it, in the form that it reads.

        Args:
            chat: in the form of `messages`.
            opens_reply: whether the text goes on up to where the assistant speaks.

        Raises:
            ValueError: the template cannot render these messages, or leaves out what they say.
        """
        form, missing = self._finding(chat)
        # A reply is the same whether or not a thought before it is shown.
        if any(not (claim.thought and opens_reply) for claim in missing):
            places = [claim.place for claim in self._find(chat)[1]]
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            raise ValueError(
                f"the chat template leaves out {'; '.join(places[:3])}{more}: give a template that writes it "
                "(data.chat_template, --chat-template), or leave it out"
            )
        return self._rendered(chat, form, opens_reply)

    def opening(self, chat: Chat, turn: int) -> str:
        """What the template puts between the message before `turn` and where the assistant speaks.

        It follows from what stands before; to be linear in a chat's length, it is rendered once for each kind of
        message that the turn may follow.
        """
        key = shape_of(replace(chat, messages=chat.messages[max(turn - 1, 0) : turn]), self.source(chat))
        if key not in self._openings:
            form, before = self._finding(chat)[0], replace(chat, messages=chat.messages[:turn])
            rendered = self._rendered(before, form, opens_reply=True)
            # A template that writes a message outside its loop (Llama 3.1 the first, with tools) shows no end of it.
            closed = rendered.tail if rendered.turns[-1] else len(self._rendered(before, form, False).text)
            self._openings[key] = rendered.text[closed:]
        return self._openings[key]

    def _finding(self, chat: Chat) -> Finding:
        """Found once for each shape of chat."""
        shape = shape_of(chat, self.source(chat))
        if shape not in self._findings:
            found = self._find(chat)
            if len(self._findings) >= MOST_SHAPES:
                self._findings.clear()
            self._findings[shape] = found
        return self._findings[shape]

    def _find(self, chat: Chat) -> Finding:
        failures: list[ValueError] = []
        found: list[Finding] = []
        for form in FORMS:
            try:
                found.append((form, self._missing(chat, form)))
            except ValueError as error:
                failures.append(error)
                continue
            if not found[-1][1]:
                return found[-1]
        if not found:
            raise failures[0]
        return min(found, key=lambda finding: len(finding[1]))

    def _missing(self, chat: Chat, form: Form) -> list[Claim]:
        """What the template leaves out of the chat in that form. Words that stand in are the surer test, as short ones
        may stand in the text by chance; but a template may refuse them, where it reads JSON or dates."""
        example = stand_in(chat)
        try:
            text = self._rendered(example, form, opens_reply=False).text
        except ValueError:
            example = chat
            text = self._rendered(example, form, opens_reply=False).text
        self._check_marks(example, form, text)
        return left_out(example, text)

    def _check_marks(self, chat: Chat, form: Form, text: str) -> None:
        template = _compiled(self.source(chat))
        plain = self._attempt(chat, form, False, lambda messages, names: template.render(messages=messages, **names))
        if plain != text:
            raise ValueError(
                "the chat template looks at its own text, so the assistant's part of it cannot be told apart; set "
                'data.chat_template to one that does not, or give the rows as {"prompt", "completion"}'
            )

    def _rendered(self, chat: Chat, form: Form, opens_reply: bool) -> Rendered:
        template = _marked(self.source(chat))
        return self._attempt(chat, form, opens_reply, lambda messages, names: render(template, messages, names))

    def _attempt(self, chat: Chat, form: Form, opens_reply: bool, rendering) -> Any:
        messages = [form(message) for message in _roles(chat.messages, self.source(chat))]
        try:
            return rendering(messages, self._variables(chat, opens_reply))
        except Exception as error:  # a template is a program, and may fail as any
            roles = ", ".join(message["role"] for message in messages[:8]) + (", …" if len(messages) > 8 else "")
            reason = str(error) or type(error).__name__
            raise ValueError(f"the chat template cannot render messages of the roles {roles}: {reason}") from error

    def _variables(self, chat: Chat, opens_reply: bool) -> dict[str, Any]:
        today = self._today
        clock = {TODAY: today.strftime} if today else {}
        names = {**self._tokenizer.special_tokens_map, **clock, **chat.options}
        return names | {"tools": chat.tools, "documents": None, "add_generation_prompt": opens_reply}


def _roles(messages: Sequence[Mapping[str, Any]], source: str) -> list[Mapping[str, Any]]:
    """A developer's message is the system's to a template that knows no developer."""
    if "developer" in source:
        return list(messages)
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """As transformers compiles it: its environment has the filters and functions that templates of the Hub rely on."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error


@functools.lru_cache(maxsize=32)
def _marked(source: str) -> jinja2.Template:
    return marked(_compiled(source).environment, source)
