"""A chat template that says, while it renders, which characters come from which message.

The template's syntax tree is given additions that write marks into the text: one where the body of a loop begins, with
the number of the message that the loop has come to, one behind the loop, and two around each `{% generation %}` block.
One rendering, linear in the chat's length, thereby gives the text and the spans, however the template treats a turn
that stands last, first, or before a tool's result. The text without the marks is the text that the template writes.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes

Span = tuple[int, int]  # characters [start, end)

# Noncharacters, which no text that may be exchanged holds, and a word that no row can know.
OPEN, SHUT = f"\ufdd0{secrets.token_hex(8)}", "\ufdd1"
MARK = re.compile(f"{OPEN}([^{SHUT}]*){SHUT}")
MESSAGE, LOOP_END = "_message_mark", "_loop_end_mark"  # the marking functions' names in the template


@dataclass(kw_only=True)
class Rendered:
    """A chat as text, and where its parts stand.

    turns: for each message the spans that the template wrote for it: none where it wrote nothing of its own, several
        where it put another message between (Gemma 4 has a tool's result inside the turn that asked for it).
    blocks: the spans of `{% generation %}` blocks, in order.
    tail: where what follows the last message begins: the opening of the next turn, if it was asked for.
    """

    text: str = ""
    turns: list[list[Span]] = field(default_factory=list)
    blocks: list[Span] = field(default_factory=list)
    tail: int = 0


def marked(environment: jinja2.Environment, source: str) -> jinja2.Template:
    """The template `source` with marks; `environment` is the one that transformers compiles templates in."""
    tree = environment.parse(source)
    for number, loop in enumerate(list(tree.find_all(nodes.For))):
        _mark_loop(tree, loop, nodes.Const(number))
    for block in tree.find_all(nodes.CallBlock):
        if isinstance(block.call.node, nodes.ExtensionAttribute):
            block.body.insert(0, _text(f"{OPEN}({SHUT}"))
            block.body.append(_text(f"{OPEN}){SHUT}"))
    return environment.from_string(tree)


def _mark_loop(tree: nodes.Node, loop: nodes.For, number: nodes.Const) -> None:
    """Marks the message that the loop has come to: its own variable, or in a loop over numbers the one it looks up."""
    if not isinstance(loop.target, nodes.Name):
        return
    looked_up = next((one for one in loop.find_all(nodes.Assign) if _looks_up(one, loop.target.name)), None)
    if looked_up and isinstance(looked_up.target, nodes.Name):
        _insert_after(loop, looked_up, _call(MESSAGE, number, nodes.Name(looked_up.target.name, "load")))
    else:
        loop.body.insert(0, _call(MESSAGE, number, nodes.Name(loop.target.name, "load")))
    _insert_after(tree, loop, _call(LOOP_END, number))


def _looks_up(assign: nodes.Assign, variable: str) -> bool:
    """Whether it is `{% set name = messages[variable] %}`."""
    value = assign.node
    return isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Name) and value.arg.name == variable


def render(template: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendered:
    """The text of `messages` and its parts.

    Raises:
        jinja2.TemplateError: as the template raises it. TypeError: it does with a message what its type cannot.
    """
    numbers = {id(message): i for i, message in enumerate(messages)}
    in_messages: set[int] = set()  # the loops that have come to a message

    def message_mark(loop: int, item: Any) -> str:
        if id(item) not in numbers:
            return ""
        in_messages.add(loop)
        return f"{OPEN}{loop}:{numbers[id(item)]}{SHUT}"

    def loop_end_mark(loop: int) -> str:
        if loop not in in_messages:
            return ""  # templates may ask whether a part of their text is empty
        in_messages.discard(loop)
        return f"{OPEN}{loop}{SHUT}"

    marks = {MESSAGE: message_mark, LOOP_END: loop_end_mark}
    return _parts(template.render(messages=messages, **variables, **marks), len(messages))


def _parts(marked_text: str, count: int) -> Rendered:
    rendered = Rendered(turns=[[] for _ in range(count)])
    pieces: list[str] = []
    open_loops: list[tuple[str, int]] = []  # (loop, message), the innermost last
    opened, length = 0, 0
    for i, piece in enumerate(MARK.split(marked_text)):
        if i % 2 == 0:
            pieces.append(piece)
            if open_loops and piece:
                _extend(rendered.turns[open_loops[-1][1]], length, length + len(piece))
                rendered.tail = length + len(piece)
            length += len(piece)
        elif piece == "(":
            opened = length
        elif piece == ")":
            rendered.blocks.append((opened, length))
        else:
            _enter_or_leave(open_loops, piece)
    rendered.text = "".join(pieces)
    return rendered


def _enter_or_leave(open_loops: list[tuple[str, int]], mark: str) -> None:
    """ "loop:message" opens a loop or takes it on, "loop" ends it and what is open inside."""
    loop, _, message = mark.partition(":")
    depth = next((d for d, (name, _) in enumerate(open_loops) if name == loop), len(open_loops))
    del open_loops[depth:]
    if message:
        open_loops.append((loop, int(message)))


def _extend(spans: list[Span], start: int, end: int) -> None:
    """Adds a span, as part of the last one where they touch."""
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, end))


def _call(function: str, *arguments: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), list(arguments), [], None, None)])


def _text(text: str) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(text)])


def _insert_after(tree: nodes.Node, node: nodes.Node, new: nodes.Node) -> None:
    """Puts `new` behind `node` in the list of statements that holds it."""
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for _, value in parent.iter_fields():
            if isinstance(value, list) and any(item is node for item in value):
                value.insert(next(i for i, item in enumerate(value) if item is node) + 1, new)
                return
