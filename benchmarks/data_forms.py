"""Writes the table of accepted rows in docs/data.md: `python benchmarks/data_forms.py`.

Each row of FORMS is encoded as training does, with the demo base's tokenizer; what is learned stands between ⟦ and ⟧.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the checkout's root

from benchmarks.pages import fill_part  # noqa: E402
from qlora_jax.data import Row, encode, load_tokenizer, to_example  # noqa: E402

PAGE = ROOT / "docs" / "data.md"
PART = "forms"

# The demo base's own template writes no tools; this one does, in Qwen's manner.
WITH_TOOLS = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QUESTION, ANSWER = {"role": "user", "content": "type of 3"}, {"role": "assistant", "content": "int"}
TOOL = {"name": "run", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}}
CALL = {"name": "run", "arguments": '{"code": "type(3)"}'}

# (what it is, the row, a chat template or None for the base's own)
FORMS: list[tuple[str, Mapping[str, Any], str | None]] = [
    ("Plain text", {"text": "type of 3: int"}, None),
    ("A prompt and its completion", {"prompt": "type of 3:", "completion": " int"}, None),
    ("Messages", {"messages": [QUESTION, ANSWER]}, None),
    (
        "Messages that are not learned (`weight` or `train` of 0)",
        {"messages": [QUESTION, {**ANSWER, "content": "str", "weight": 0}, {**QUESTION, "content": "sure?"}, ANSWER]},
        None,
    ),
    (
        "Content in parts, and null keys",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "type of 3"}], "name": None}, ANSWER]},
        None,
    ),
    ("A prompt and its completion as messages", {"prompt": [QUESTION], "completion": [ANSWER]}, None),
    (
        "Messages with tools (arguments as JSON text or as an object)",
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "<class 'int'>"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        WITH_TOOLS,
    ),
    (
        "ShareGPT, with its columns `system` and `tools`",
        {
            "conversations": [
                {"from": "human", "value": "type of 3"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "<class 'int'>"},
                {"from": "gpt", "value": "int"},
            ],
            "system": "be brief",
            "tools": json.dumps([TOOL]),
        },
        WITH_TOOLS,
    ),
    (
        "Alpaca, with `system` and `history`",
        {
            "instruction": "type of",
            "input": "3",
            "output": "int",
            "system": "be brief",
            "history": [["type of 'a'", "str"]],
        },
        None,
    ),
    (
        "A chat that opens with the assistant (that turn is context)",
        {"messages": [{"role": "assistant", "content": "Ask me."}, QUESTION, ANSWER]},
        None,
    ),
]


def shown(row: Mapping[str, Any], chat_template: str | None) -> str:
    """The row's tokens as text, with ⟦⟧ around what is learned, and their numbers."""
    tokenizer = load_tokenizer(str(ROOT / "demo" / "base"))
    example = to_example(Row(values=row, origin="row"), alpaca_as_chat=True)
    encoded = encode(example, tokenizer, seq_len=4096, chat_template=chat_template)
    ids, scored = encoded.ids.tolist(), encoded.scored.tolist()
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or scored[end] != scored[start]:
            piece = tokenizer.decode(ids[start:end])
            text, start = text + (f"⟦{piece}⟧" if scored[start] else piece), end
    return f"{text}\n\n{len(ids)} tokens, {sum(scored)} learned"


def page() -> str:
    """The part of docs/data.md."""
    blocks = []
    for title, row, template in FORMS:
        written = json.dumps(row, ensure_ascii=False)
        blocks.append(f"**{title}**\n\n```json\n{written}\n```\n\n```text\n{shown(row, template)}\n```\n")
    return "\n" + "\n".join(blocks) + "\n"


if __name__ == "__main__":
    fill_part(PAGE, PART, page())
    print(f"wrote the part {PART!r} of {PAGE.relative_to(ROOT)}")
