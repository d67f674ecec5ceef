"""What a row means: its columns decide whether it is plain text, a prompt with its completion, or a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.sources import Row

ACCEPTED = (
    '{"text"}, {"prompt", "completion"}, {"messages"}, {"instruction", "output", optional "input"} (Alpaca) '
    'or {"conversations"} (ShareGPT)'
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

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

    messages: each with "role", and "content" or "tool_calls"; the template may read further keys.
    tools: JSON schemas of the functions the assistant may call.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


Example = Text | Completion | Chat


def to_example(row: Row, *, alpaca_as_chat: bool) -> Example:
    """The row as one of the three examples.

    A row with the columns of several formats takes the most structured one: messages, conversations,
    prompt/completion, instruction/output, text. A column holding null counts as absent.

    Args:
        row: as stored.
        alpaca_as_chat: whether instruction rows become a two-message chat (as they should where there is a
            chat template) or the Alpaca prompt with its completion.

    Raises:
        ValueError: columns are missing or hold the wrong type; the message names the file and row.
    """
    held = {name for name, value in row.values.items() if value is not None}
    if "messages" in held:
        return _messages(row)
    if "conversations" in held:
        return _sharegpt(row)
    if {"prompt", "completion"} <= held:
        return Completion(prompt=_string(row, "prompt"), completion=_string(row, "completion"))
    if {"instruction", "output"} <= held:
        return _alpaca(row, alpaca_as_chat)
    if "text" in held:
        return Text(text=_string(row, "text"))
    columns = ", ".join(row.values) or "none"
    raise ValueError(f"{row.origin}: found the columns {columns} (null counts as absent); a row needs {ACCEPTED}")


def _string(row: Row, column: str) -> str:
    return _checked_string(row.values[column], f"{row.origin}: column {column!r}")


def _checked_string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} must be a string, found {type(value).__name__} {value!r:.60}")
    return value


def _objects(row: Row, column: str) -> list[Mapping[str, Any]]:
    value = row.values[column]
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(
            f"{row.origin}: column {column!r} must be a non-empty list of objects, "
            f"found {type(value).__name__} {value!r:.60}"
        )
    return value


def _messages(row: Row) -> Chat:
    messages = enumerate(_objects(row, "messages"))
    tools = _objects(row, "tools") if row.values.get("tools") else None
    return Chat(messages=[_message(m, f"{row.origin}: messages[{i}]") for i, m in messages], tools=tools)


def _message(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    held = {key: value for key, value in message.items() if value is not None}
    if "role" not in held or not ("content" in held or "tool_calls" in held):
        raise ValueError(f'{place} needs "role" and "content", found {", ".join(held) or "nothing"}')
    _checked_string(held["role"], f"{place}.role")
    _checked_string(held.get("content", ""), f"{place}.content")
    return held


def _sharegpt(row: Row) -> Chat:
    turns = enumerate(_objects(row, "conversations"))
    return Chat(messages=[_turn(turn, f"{row.origin}: conversations[{i}]") for i, turn in turns])


def _turn(turn: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    if "from" not in turn or "value" not in turn:
        raise ValueError(f'{place} needs "from" and "value", found {", ".join(turn) or "nothing"}')
    speaker = _checked_string(turn["from"], f"{place}.from")
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{place}: unknown speaker {speaker!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[speaker], "content": _checked_string(turn["value"], f"{place}.value")}


def _alpaca(row: Row, as_chat: bool) -> Example:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    context = _string(row, "input") if row.values.get("input") is not None else ""
    if as_chat:
        question = f"{instruction}\n\n{context}" if context else instruction
        return Chat(messages=[{"role": "user", "content": question}, {"role": "assistant", "content": output}])
    template = ALPACA_INPUT_PROMPT if context else ALPACA_PROMPT
    return Completion(prompt=template.format(instruction=instruction, input=context), completion=output)
