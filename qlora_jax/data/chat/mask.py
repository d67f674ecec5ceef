"""Which characters of a rendered chat are learned.

What the assistant said after its opening, up to the token that ends its turn: that is what generation will have to
produce. Where the template marks it by `{% generation %}` blocks, the blocks decide. A thought that the template writes
is learned; one that it strips from earlier turns is not there to be learned.
"""

import bisect
from collections.abc import Sequence

from qlora_jax.data.chat.marks import Rendered, Span
from qlora_jax.data.chat.said import left_out, thought_and_answer
from qlora_jax.data.chat.template import ChatTemplate
from qlora_jax.data.formats import Chat


def learned_spans(chat: Chat, rendered: Rendered, template: ChatTemplate, special: tuple[str, ...]) -> list[Span]:
    """The characters of `rendered.text` that are learned, in order.

    Args:
        special: the tokenizer's special tokens, one of which ends a turn.

    Raises:
        ValueError: there is nothing to learn, or the template does not show where a turn stands.
    """
    turns = [i for i, message in enumerate(chat.messages) if is_learned(chat, i)]
    if not turns:
        roles = list(dict.fromkeys(message["role"] for message in chat.messages))
        raise ValueError(f'no "assistant" message to learn from (the roles are {", ".join(roles)})')
    for turn in turns:
        _check_stands(chat, rendered, turn)
    if rendered.blocks:
        return _blocks_of_turns(rendered, turns)
    return [span for turn in turns for span in _turn_spans(chat, rendered, turn, template, special)]


def is_learned(chat: Chat, turn: int) -> bool:
    """Whether message `turn` is learned: it is the assistant's, says something, and is not given as context.

    A chat's first message is context always: nobody asked for it.
    """
    message = chat.messages[turn]
    says = thought_and_answer(message)[1] or message.get("tool_calls")
    return message["role"] == "assistant" and bool(says) and turn > 0 and turn not in chat.context


def ending_spans(chat: Chat, rendered: Rendered) -> list[Span]:
    """Where the token that ends a learned turn may stand, in order.

    In the turn itself: many templates close their `{% generation %}` block before that token. Where there are no blocks
    it may also be the first of the next turn, at which some models stop (GLM), if that is not the assistant's again.
    """
    spans = []
    opens = {span[0]: chat.messages[i]["role"] for i, spans in enumerate(rendered.turns) for span in spans}
    for turn in (i for i in range(len(chat.messages)) if is_learned(chat, i) and rendered.turns[i]):
        start, end = rendered.turns[turn][0][0], rendered.turns[turn][-1][1]
        at_the_next = not rendered.blocks and opens.get(end, "assistant") != "assistant"
        spans.append((start, end + 1 if at_the_next else end))
    return spans


def context_spans(chat: Chat, rendered: Rendered) -> list[Span]:
    """What the assistant said that is given as context."""
    return [span for i in sorted(chat.context) for span in rendered.turns[i]]


def _check_stands(chat: Chat, rendered: Rendered, turn: int) -> None:
    """A turn that was left out would teach no more than how a turn ends."""
    written = "".join(rendered.text[start:end] for start, end in rendered.turns[turn])
    if not written:
        raise ValueError(
            f"the chat template writes nothing for messages[{turn}], or not in a loop over the messages; set "
            'data.chat_template to one that does, or give the rows as {"prompt", "completion"}'
        )
    message = chat.messages[turn]
    answer = Chat(messages=[{**message, "content": thought_and_answer(message)[1], "reasoning_content": ""}])
    missing = left_out(answer, written)
    if missing:
        place = missing[0].place.replace("messages[0]", f"messages[{turn}]")
        raise ValueError(f"the chat template leaves out {place}, or writes it elsewhere")


def _blocks_of_turns(rendered: Rendered, turns: Sequence[int]) -> list[Span]:
    """The blocks, less those of assistant messages that are not learned."""
    learned = set(turns)
    others = {start for i, spans in enumerate(rendered.turns) if i not in learned for start, _ in spans}
    starts = sorted(start for spans in rendered.turns for start, _ in spans)
    kept = [block for block in rendered.blocks if _begin_of_span(starts, block[0]) not in others]
    if not any(start < end for start, end in kept):
        raise ValueError("the chat template's {% generation %} blocks hold no assistant text; check data.chat_template")
    return kept


def _begin_of_span(starts: Sequence[int], character: int) -> int:
    """Where the span begins that holds the character; -1 before the first one."""
    number = bisect.bisect_right(starts, character)
    return starts[number - 1] if number else -1


def _turn_spans(
    chat: Chat, rendered: Rendered, turn: int, template: ChatTemplate, special: tuple[str, ...]
) -> list[Span]:
    spans = list(rendered.turns[turn])
    if turn == len(chat.messages) - 1:
        spans[-1] = (spans[-1][0], len(rendered.text))  # what closes the chat closes its last turn
    start, end = spans[0]
    written = rendered.text[start:end]
    # After a tool's result a template may open the reply though it opened none in the prompt (DiffusionGemma's).
    opening = template.opening(chat, turn) or template.opening(chat, _first_question(chat, turn) + 1)
    spans[0] = (start + _length_of_opening(opening, written, special), end)
    start, end = spans[-1]
    spans[-1] = (start, _without_layout(rendered.text, start, end, special))
    return [(start, end) for start, end in spans if start < end]


def _first_question(chat: Chat, turn: int) -> int:
    """The number of the first user's message; without one of the message before `turn`."""
    return next((i for i, message in enumerate(chat.messages[:turn]) if message["role"] == "user"), turn - 1)


def _length_of_opening(opening: str, written: str, special: tuple[str, ...]) -> int:
    """How much of the turn as it is written is its opening.

    All of it as a rule. Reasoning models' templates may open a reply with `<think>`, and leave that out of earlier
    turns: then what both begin with, up to a line's or a special token's end.
    """
    if written.startswith(opening):
        return len(opening)
    shared = next((k for k, (a, b) in enumerate(zip(opening, written, strict=False)) if a != b), len(written))
    return next((k for k in range(shared, 0, -1) if opening[:k].endswith(("\n", *special))), 0)


def _without_layout(text: str, start: int, end: int, special: tuple[str, ...]) -> int:
    """Where the turn ends: at a special token if only white space follows it in the turn, which is layout."""
    said = text[start:end].rstrip()
    return start + len(said) if said.endswith(special) else end
