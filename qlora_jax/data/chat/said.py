"""What a chat says, in the forms that templates read, and whether a rendered text holds it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.data.formats import Chat

Message = Mapping[str, Any]
Form = Callable[[Message], dict[str, Any]]
Shape = tuple[Any, ...]
THOUGHT_ENDS = "</think>"
ENOUGH = 20  # things left out, after which no more are looked for


class Claim(NamedTuple):
    """Something that a chat says, by its place and its words. A thought is no part of the answer."""

    place: str
    words: str
    thought: bool = False


def with_objects(message: Message) -> dict[str, Any]:
    """Arguments of calls as objects, content as text: what most templates read. A thought goes by both its names."""
    thought = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    return {**message, **thought}


def with_text_arguments(message: Message) -> dict[str, Any]:
    """Arguments of calls as JSON text, for templates that put them together with other text (DeepSeek's)."""
    calls = [_text_arguments(call) for call in message.get("tool_calls", [])]
    return with_objects(message) | ({"tool_calls": calls} if calls else {})


def with_parts(message: Message) -> dict[str, Any]:
    """Content as a list of one part, for templates of models that see (SmolVLM's)."""
    return with_objects(message) | {"content": [{"type": "text", "text": message["content"]}]}


FORMS: Sequence[Form] = (with_objects, with_text_arguments, with_parts)


def _text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def shape_of(chat: Chat, source: str) -> Shape:
    """What may decide which parts of a chat a template writes: which kinds of messages follow which, not how often.

    Chats of one shape are alike to a template, however long they are.
    """
    kinds = [_kind(message) for message in chat.messages]
    last_question = _last_question(chat)
    places = [(i == len(kinds) - 1, i > last_question) for i in range(len(kinds))]
    steps = frozenset(zip([None, *kinds], kinds, places, strict=False))
    options = json.dumps(chat.options, sort_keys=True, default=str) if chat.options else ""
    return (source, bool(chat.tools), options, steps)


def _kind(message: Message) -> Shape:
    thought, answer = thought_and_answer(message)
    return (message["role"], bool(answer), bool(thought), min(len(message.get("tool_calls", [])), 2))


def _last_question(chat: Chat) -> int:
    return max((i for i, message in enumerate(chat.messages) if message["role"] == "user"), default=-1)


def thought_and_answer(message: Message) -> tuple[str, str]:
    """What a message thinks, in a field of its own or before `</think>` in its content, and what it then says."""
    thought, ended, answer = message["content"].rpartition(THOUGHT_ENDS)
    if message["role"] != "assistant" or not ended:
        return message.get("reasoning_content", "").strip(), message["content"].strip()
    return thought.replace("<think>", "").strip(), answer.strip()


def stand_in(chat: Chat) -> Chat:
    """The chat with words of its own in place of what it says, none of which another one holds."""
    messages = [_stand_in(message, f"{i:05}") for i, message in enumerate(chat.messages)]
    tools = [_renamed(tool, f"tool{i:05}x") for i, tool in enumerate(chat.tools or [])]
    return Chat(messages=messages, tools=tools or None, options=chat.options)


def _stand_in(message: Message, number: str) -> Message:
    thought, answer = thought_and_answer(message)
    new = dict(message)
    if "reasoning_content" in message and thought:
        new["reasoning_content"] = f"thought{number}x"
    new["content"] = f"said{number}x" if answer else ""
    if THOUGHT_ENDS in message["content"] and message["role"] == "assistant":
        new["content"] = f"<think>\nthought{number}x\n</think>\n\n{new['content']}"
    calls = [_stand_in_call(call, f"{number}n{k:05}x") for k, call in enumerate(message.get("tool_calls", []))]
    return new | ({"tool_calls": calls} if calls else {})


def _stand_in_call(call: Mapping[str, Any], number: str) -> dict[str, Any]:
    arguments = {f"key{number}": f"value{number}"} if call["function"]["arguments"] else {}
    return _renamed(call, f"call{number}", arguments=arguments)


def _renamed(value: Mapping[str, Any], name: str, **others: Any) -> dict[str, Any]:
    return {**value, "function": {**value["function"], "name": name, **others}}


def left_out(chat: Chat, text: str) -> list[Claim]:
    """The first things that the chat says and the text does not hold: tools, contents, calls, late thoughts.

    Templates may leave out what the assistant thought before the last question, and many do.
    """
    shortened, found, missing = "".join(text.split()), 0, []
    for claim in _claims(chat):
        # Most stand in their order: looking on from the one before keeps this linear in the text.
        place = _find(claim.words, shortened, found)
        found = max(place, found)
        if place < 0 and _find(claim.words, shortened, 0) < 0:
            missing.append(claim)
        if len(missing) == ENOUGH:
            break
    return missing


def _claims(chat: Chat) -> Iterator[Claim]:
    for i, tool in enumerate(chat.tools or []):
        yield Claim(f"tools[{i}]", tool["function"]["name"])
    last_question = _last_question(chat)
    for i, message in enumerate(chat.messages):
        thought, answer = thought_and_answer(message)
        if answer:
            yield Claim(f"the content of messages[{i}] ({message['role']})", answer)
        if thought and i > last_question:
            yield Claim(f"the thought of messages[{i}]", thought, thought=True)
        for call in message.get("tool_calls", []):
            yield Claim(f"a tool call of messages[{i}]", call["function"]["name"])
            for name, value in call["function"]["arguments"].items():
                words = value if isinstance(value, str) else name
                yield Claim(f"an argument of a tool call of messages[{i}]", words)


def _find(words: str, shortened: str, start: int) -> int:
    """Where the text, less all white space, holds the words as they are or as JSON writes them; -1 for nowhere."""
    for written in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        place = shortened.find("".join(written.split()), start)
        if place >= 0:
            return place
    return -1
