"""Rows and folders that people reported of fine-tuning elsewhere, through the whole command: the tokens that count."""

import json

import datasets
import pytest

from qlora_jax.cli.train import main as train
from qlora_jax.training.metrics import read_rows
from tests.cli.commands import command, exit_code

# One token a byte, and each turn's end is one token.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{{ '\n' }}{% endif %}{% endfor %}"
)
SHORT = (
    *("train.steps=1", "train.batch_size=1", "train.grad_accum=1", "train.seq_len=320", "train.eval_every=0"),
    *("model.max_position=320", "data.eval=", "data.packing=false", "data.samples=0"),
)
HI, GOOD = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
CALL = {"name": "add", "arguments": {"a": 1}}
CALLED = len(json.dumps(CALL)) + 1
TOOL_CHAT = [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, GOOD]


def jsonl(*rows):
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(*rows):
    return lambda path: datasets.Dataset.from_list(list(rows)).to_parquet(path)


# name → (files, the template, further overrides, the learned tokens of the one step, or the words of the error)
CASES = {
    "a weight of zero": (
        {"rows.jsonl": jsonl({"messages": [HI, {**GOOD, "content": "wrong", "weight": 0}, HI, GOOD]})},
        PLAIN,
        (),
        len("good") + 1,
    ),
    "tools that the template drops": (
        {"rows.jsonl": jsonl({"messages": TOOL_CHAT, "tools": TOOLS})},
        PLAIN,
        (),
        "leaves out tools[0]; a tool call of messages[1]",
    ),
    "arguments as JSON text": (
        {
            "rows.jsonl": jsonl(
                {
                    "messages": [
                        HI,
                        {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"a": 1}'}]},
                        *TOOL_CHAT[2:],
                    ],
                    "tools": json.dumps(TOOLS),
                }
            )
        },
        WITH_TOOLS,
        (),
        CALLED + len("good") + 1,
    ),
    "ShareGPT's columns": (
        {
            "rows.jsonl": jsonl(
                {
                    "conversations": [
                        {"from": "human", "value": "hi"},
                        {"from": "function_call", "value": json.dumps(CALL)},
                        {"from": "observation", "value": "2"},
                        {"from": "gpt", "value": "good"},
                    ],
                    "system": "be brief",
                    "tools": json.dumps(TOOLS),
                }
            )
        },
        WITH_TOOLS,
        (),
        CALLED + len("good") + 1,
    ),
    "nulls that Arrow adds": (
        # Both rows are of one length, so that either may be the step's.
        {
            "rows.parquet": parquet(
                {"messages": TOOL_CHAT, "tools": TOOLS},
                {
                    "messages": [
                        HI,
                        {**TOOL_CHAT[1], "tool_calls": [{"name": "add", "arguments": {"b": 1}}]},
                        *TOOL_CHAT[2:],
                    ],
                    "tools": TOOLS,
                },
            )
        },
        WITH_TOOLS,
        (),
        CALLED + len("good") + 1,
    ),
    "blocks that end in a line": ({"rows.jsonl": jsonl({"messages": [HI, GOOD, HI, GOOD]})}, BLOCKS, (), 12),
    "a test file beside the training file": (
        {
            "my-train.jsonl": jsonl({"messages": [HI, GOOD]}),
            "my-test.jsonl": jsonl({"messages": [HI, {**GOOD, "content": "a test"}]}),
        },
        PLAIN,
        (),
        len("good") + 1,
    ),
    "sources by weight": (
        {"rows.jsonl": jsonl({"messages": [HI, GOOD]}), "more.jsonl": jsonl({"messages": [HI, GOOD]})},
        PLAIN,
        ('data.train=[{"path": "DATA/rows.jsonl", "weight": 1}, {"path": "DATA/more.jsonl", "weight": 3}]',),
        len("good") + 1,
    ),
    "one odd row among others": (
        {"rows.jsonl": jsonl({"messages": [HI]}, {"text": "\ud800"}, {"messages": [HI, GOOD]}, {"odd": 1})},
        PLAIN,
        (),
        len("good") + 1,
    ),
    "odd rows that are not allowed": (
        {"rows.jsonl": jsonl({"messages": [HI]}, {"messages": [HI, GOOD]})},
        PLAIN,
        ("data.max_bad_rows=0",),
        '1 of 2 rows cannot be learned from, and config.data.max_bad_rows allows 0: rows.jsonl, row 1: no "assistant"',
    ),
    "a chat that opens with the assistant": (
        {"rows.jsonl": jsonl({"messages": [{**GOOD, "content": "Ask me."}, HI, GOOD]})},
        PLAIN,
        (),
        len("good") + 1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_reported(case, sound, tmp_path, capsys):
    files, template, more, expected = CASES[case]
    data = tmp_path / "data"
    data.mkdir()
    for name, write in files.items():
        write(data / name)
    (tmp_path / "template.jinja").write_text(template)
    given = [change.replace("DATA", str(data)) for change in more]
    changes = (f"data.train={data}", f"data.chat_template={tmp_path / 'template.jinja'}", *SHORT, *given)
    code = exit_code(train, command(sound, tmp_path / "run", *changes))
    if isinstance(expected, str):
        assert code == 1
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return
    assert code == 0
    [row] = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert row["tokens"] == expected
