"""What a row means: its columns decide whether it is plain text, a prompt with its completion, or a chat.

A column that changes what a row means is read, or the row is refused; what else a row holds is named once in the log
(`unread_columns`). docs/data.md shows every form with its tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.data.messages import Message, check_unicode, messages_of, options_of, text_of, tools_of
from qlora_jax.data.row import Row

ACCEPTED = (
    '{"text"}, {"prompt", "completion"}, {"messages"}, {"instruction", "output", optional "input"} (Alpaca) '
    'or {"conversations"} (ShareGPT)'
)
CHAT_COLUMNS = {"system", "tools", "functions", "chat_template_kwargs"}
# Columns that change what a row means. Where a form does not read one, a row that holds it is refused.
MEANINGFUL = CHAT_COLUMNS | {"history", "weight", "images", "image", "videos", "video", "audios", "audio"}

# The wording the Alpaca models were trained with; base models fine-tuned by others expect exactly this text.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text: every token is learned."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Raw text in two parts: only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation: the assistant's turns are learned.

    messages: as `messages.message_of` gives them. tools: as `messages.tools_of` gives them.
    options: further variables for the template (`chat_template_kwargs`).
    context: the numbers of assistant messages that are read but not learned.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    context: frozenset[int] = frozenset()


Example = Text | Completion | Chat


def to_example(row: Row, *, alpaca_as_chat: bool) -> Example:
    """The row as one of the three examples.

    A row with the columns of several formats takes the most structured one: messages, conversations,
    prompt/completion, instruction/output, text. A column holding null counts as absent.

    Args:
        row: as stored.
        alpaca_as_chat: whether instruction rows become a chat (as they should where there is a chat template) or the
            Alpaca prompt with its completion.

    Raises:
        ValueError: columns are missing, hold the wrong type, or mean what cannot be read; the message names the file
            and row.
    """
    if row.problem:
        raise ValueError(f"{row.origin}: {row.problem}")
    held = {name: value for name, value in row.values.items() if value is not None}
    try:
        form, read, make = _form(held, alpaca_as_chat)
        _refuse_unread(form, held, read)
        return make(held)
    except ValueError as error:
        raise ValueError(f"{row.origin}: {error}") from error


def unread_columns(row: Row, *, alpaca_as_chat: bool) -> set[str]:
    """The columns of a readable row that hold something and are not read."""
    held = {name: value for name, value in row.values.items() if value is not None}
    return set(held) - _form(held, alpaca_as_chat)[1]


def _form(held: Mapping[str, Any], alpaca_as_chat: bool):
    """(the form's name, the columns that it reads, what makes an example of them)."""
    if "messages" in held:
        return "messages", {"messages"} | CHAT_COLUMNS, lambda held: _chat(held, "messages")
    if "conversations" in held:
        return "conversations", {"conversations"} | CHAT_COLUMNS, lambda held: _chat(held, "conversations")
    if {"prompt", "completion"} <= set(held):
        if isinstance(held["prompt"], str) and isinstance(held["completion"], str):
            return "prompt and completion as text", {"prompt", "completion"}, _completion
        return "prompt and completion as messages", {"prompt", "completion"} | CHAT_COLUMNS, _split_chat
    if {"instruction", "output"} <= set(held):
        columns = {"instruction", "input", "output"}
        if alpaca_as_chat:
            return "Alpaca", columns | {"history"} | CHAT_COLUMNS, _alpaca_chat
        return "Alpaca without a chat template", columns, _alpaca_text
    if "text" in held:
        return "text", {"text"}, lambda held: Text(text=_string(held, "text"))
    raise ValueError(f"found the columns {', '.join(held) or 'none'}; a row needs {ACCEPTED}")


def _refuse_unread(form: str, held: Mapping[str, Any], read: set[str]) -> None:
    """A weight of 1 and an empty column mean nothing."""
    unread = [name for name in held if name in MEANINGFUL - read and held[name] not in ("", [], {}, 1)]
    if unread:
        names = ", ".join(map(repr, unread))
        raise ValueError(f"a row of the form {form} with {names}, which is not read there: leave it out, or use a chat")


def _string(held: Mapping[str, Any], column: str) -> str:
    value = held[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a string, found {type(value).__name__} {value!r:.60}")
    check_unicode(value, f"column {column!r}")
    return value


def _completion(held: Mapping[str, Any]) -> Completion:
    return Completion(prompt=_string(held, "prompt"), completion=_string(held, "completion"))


def _chat(held: Mapping[str, Any], column: str) -> Chat:
    return _with_columns(messages_of(held[column], column), held)


def _split_chat(held: Mapping[str, Any]) -> Chat:
    """Messages as the prompt and as the completion: what the prompt's assistant said is context."""
    prompt = messages_of(held["prompt"], "prompt")
    completion = messages_of(held["completion"], "completion")
    return _with_columns([{**message, "weight": 0} for message in prompt] + completion, held)


def _alpaca_chat(held: Mapping[str, Any]) -> Chat:
    messages: list[Message] = []
    for i, turn in enumerate(held.get("history") or []):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ValueError(f"column 'history'[{i}] must be a pair of a question and its answer, found {turn!r:.60}")
        messages += _exchange(*(text_of(said, f"column 'history'[{i}]") for said in turn))
    instruction, context = _string(held, "instruction"), _string(held, "input") if held.get("input") else ""
    question = f"{instruction}\n\n{context}" if context else instruction
    return _with_columns(messages + _exchange(question, _string(held, "output")), held)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca_text(held: Mapping[str, Any]) -> Completion:
    instruction, context = _string(held, "instruction"), _string(held, "input") if held.get("input") else ""
    template = ALPACA_INPUT_PROMPT if context else ALPACA_PROMPT
    return Completion(
        prompt=template.format(instruction=instruction, input=context), completion=_string(held, "output")
    )


def _with_columns(messages: list[Message], held: Mapping[str, Any]) -> Chat:
    """The chat with what the row's other columns say of it, and without the keys that say what is learned."""
    system = text_of(held.get("system") or "", "column 'system'")
    if system and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] != system:
            raise ValueError("column 'system' and the first message differ: leave one out")
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    context = frozenset(i for i, message in enumerate(messages) if _is_context(message, f"messages[{i}]"))
    kept = [{key: value for key, value in m.items() if key not in ("weight", "train")} for m in messages]
    tools = tools_of(held.get("tools") or held.get("functions"), "tools")
    options = options_of(held.get("chat_template_kwargs"), "chat_template_kwargs")
    return Chat(messages=kept, tools=tools, options=options, context=context)


def _is_context(message: Message, place: str) -> bool:
    """Whether OpenAI's "weight" or Axolotl's "train" says that this message of the assistant is not learned."""
    said = [message[key] for key in ("weight", "train") if key in message]
    if any(value not in (0, 1) or value != said[0] for value in said):
        raise ValueError(f'{place}: "weight" and "train" must be 0 or 1, and not differ; found {said!r:.60}')
    assistant = message["role"] == "assistant"
    if 1 in said and not assistant:
        raise ValueError(f"{place}: only what the assistant says can be learned, not a {message['role']!r} message")
    return assistant and 0 in said
