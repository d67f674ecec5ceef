"""One message, one call, one tool in the form that chat templates read, whatever form they were written in.

Training rows and requests of clients go through here alike, so that what is learned is what will be asked.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = {
    **{"human": "user", "user": "user", "prompter": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"tool": "tool", "observation": "tool", "ipython": "tool", "function": "tool", "function_response": "tool"},
    **{"system": "system", "developer": "developer"},
    # The assistant's, whose text is the call itself.
    **{"function_call": "assistant", "tool_call": "assistant"},
}
CALLS = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "thinking", "reasoning")


def messages_of(value: Any, place: str) -> list[Message]:
    """A non-empty list of messages, or its JSON text, in the form of `message_of`. ValueError names the place."""
    items = _parsed(value, place)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise ValueError(f"{place} must be a non-empty list of objects, found {_shown(items)}")
    return [message_of(item, f"{place}[{i}]") for i, item in enumerate(items)]


def message_of(value: Any, place: str) -> Message:
    """A message as templates read it: "role", "content" (text), "tool_calls" with objects as arguments.

    Read are OpenAI's form ("role", "content" as text or as parts of text, "tool_calls" with arguments as JSON text or
    as an object, the older "function_call"), and ShareGPT's ("from", "value"). Keys that hold null count as absent;
    other keys are passed on, for the template may read them.

    Raises:
        ValueError: an unknown role, or content that is no text; the message opens with `place`.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be an object, found {_shown(value)}")
    held = {key: item for key, item in value.items() if item is not None}
    speaker, content = _either(held, "role", "from", place), _either(held, "content", "value", place)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{place}: {speaker!r:.60} is no known role; expected one of {', '.join(ROLES)}")
    if role == "assistant" and content is None and isinstance(held.get("refusal"), str):
        content = held["refusal"]
    calls = _calls(held, speaker, content, place)
    if content is None and not calls:
        raise ValueError(f'{place} needs "role" and "content", found {", ".join(held) or "nothing"}')
    text = "" if calls and speaker in CALLS else text_of(content if content is not None else "", f"{place}.content")
    rest = {key: item for key, item in held.items() if key not in _REWRITTEN}
    reasoning = _reasoning(held, place)
    return {"role": role, "content": text} | calls | reasoning | rest


_REWRITTEN = {"role", "from", "content", "value", "tool_calls", "function_call", "refusal", *REASONING}


def text_of(content: Any, place: str) -> str:
    """Text, or the text of a list of text parts, joined. ValueError for anything else, and for half characters."""
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{place} must be a string or a list of text parts, found {_shown(content)}")
    check_unicode(content, place)
    return content


def check_unicode(text: str, place: str) -> None:
    """JSON can hold what UTF-8 cannot, and tokenizers say of it only that it is of the wrong type."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: character {error.start} is half a surrogate pair, which is no Unicode") from error


def tools_of(value: Any, place: str) -> list[Tool] | None:
    """The tools, a list or its JSON text, each as {"type": "function", "function": {"name", …}}; None for none.

    Raises:
        ValueError: no list, or a tool without a name; the message opens with `place`.
    """
    items = _parsed(value, place) if value not in (None, "") else None
    if not items and (items is None or isinstance(items, Sequence)):
        return None
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise ValueError(f"{place} must be a list of tools, found {_shown(items)}")
    return [_tool(item, f"{place}[{i}]") for i, item in enumerate(items)]


def options_of(value: Any, place: str) -> dict[str, Any]:
    """What a row or a request hands to the template besides: an object or its JSON text; {} for none.

    Raises:
        ValueError: no object, or a name that is the caller's own to set.
    """
    options = _parsed(value, place) if value not in (None, "") else {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{place} must be an object, found {_shown(options)}")
    own = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"} & set(options)
    if own:
        raise ValueError(f"{place}: {', '.join(sorted(own))} cannot be set here")
    return dict(options)


def _either(held: Mapping[str, Any], name: str, other: str, place: str) -> Any:
    if name in held and other in held and held[name] != held[other]:
        raise ValueError(f"{place} has both {name!r} and {other!r}, and they differ: leave one out")
    return held.get(name, held.get(other))


def _part(part: Any, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise ValueError(
        f"{place} must be a part of text, found {f'a part of type {kind!r:.40}' if kind else _shown(part)}"
    )


def _reasoning(held: Mapping[str, Any], place: str) -> Message:
    texts = {text_of(held[name], f"{place}.{name}") for name in REASONING if name in held}
    if len(texts) > 1:
        raise ValueError(f"{place} has several of {', '.join(REASONING)}, and they differ: leave one")
    return {"reasoning_content": texts.pop()} if texts else {}


def _calls(held: Mapping[str, Any], speaker: str, content: Any, place: str) -> Message:
    """{"tool_calls": […]}, or {} where nothing is called."""
    calls = _parsed(held.get("tool_calls") or [], f"{place}.tool_calls")
    if not isinstance(calls, Sequence):
        raise ValueError(f"{place}.tool_calls must be a list, found {_shown(calls)}")
    named = [(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if "function_call" in held:
        named.append((_parsed(held["function_call"], f"{place}.function_call"), f"{place}.function_call"))
    if speaker in CALLS and not named:
        said = _parsed(content, f"{place}.value")
        named = [(call, f"{place}.value") for call in (said if isinstance(said, list) else [said])]
    if named and ROLES[speaker] != "assistant":
        raise ValueError(f"{place}: only the assistant calls tools, not {speaker!r}")
    return {"tool_calls": [_call(call, where) for call, where in named]} if named else {}


def _call(value: Any, place: str) -> Message:
    function = _function(value, place)
    arguments = function.get("arguments")
    arguments = _parsed(arguments, f"{place}: arguments") if arguments not in (None, "") else {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{place}: arguments must be a JSON object, found {_shown(arguments)}")
    outer = {key: item for key, item in value.items() if key in ("id", "index") and item is not None}
    return outer | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(value: Any, place: str) -> Tool:
    value = _parsed(value, place)
    function = {key: item for key, item in _function(value, place).items() if key != "type"}
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _parsed(function["parameters"], f"{place}: parameters")
    return {"type": "function", "function": function}


def _function(value: Any, place: str) -> Mapping[str, Any]:
    """The object with the function's name: `value` itself, or what it holds as "function"."""
    function = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{place} must be an object with a "name", found {_shown(function)}')
    return {key: item for key, item in function.items() if item is not None}


def _parsed(value: Any, place: str) -> Any:
    """Objects and lists as they are; text as the JSON that it holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is text, but not the JSON of an object or a list: {value!r:.60}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
