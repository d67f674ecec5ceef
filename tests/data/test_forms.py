"""One meaning in every form that rows are written in: the same ids, the same mask."""

import gzip
import json

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.data import encode_rows, load_rows
from tests.data.real_templates import TEMPLATES, TOOL, build

TOKENIZER = build(TEMPLATES["qwen2_5"])
WORDS = st.text(st.sampled_from("ab é\n\"\\{}'\u2028名😀<>"), min_size=1, max_size=12).map(lambda text: f"x{text}x")
# Every key in the first row, so that Arrow keeps their order.
FULL = {"town": "Ulm", "days": 2, "how": {"unit": "C", "of": ["x"]}}
ARGUMENTS = st.sampled_from([FULL, {"town": "Bonn"}, {"days": 3, "how": {"unit": "F"}}, {}])


@st.composite
def conversations(draw):
    """Messages as OpenAI writes them, with arguments as objects."""
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": None, "tool_calls": [call(draw(ARGUMENTS))]})
            messages.append({"role": "tool", "content": draw(WORDS)})
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return messages


def call(arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


FIRST = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [call(FULL)]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "a"},
]


def as_text_arguments(messages):
    def rewritten(one):
        function = one["function"]
        return {**one, "function": {**function, "arguments": json.dumps(function["arguments"])}}

    return [
        m | ({"tool_calls": [rewritten(c) for c in m["tool_calls"]]} if "tool_calls" in m else {}) for m in messages
    ]


def as_parts(messages):
    return [m | ({"content": [{"type": "text", "text": m["content"]}]} if m["content"] else {}) for m in messages]


def as_sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    return [
        {"from": "function_call", "value": json.dumps(m["tool_calls"][0]["function"])}
        if "tool_calls" in m
        else {"from": names[m["role"]], "value": m["content"]}
        for m in messages
    ]


def as_old_openai(messages):
    """`function_call`, and the role "function" for what it gave."""
    return [
        {"role": "assistant", "content": None, "function_call": as_text_arguments([m])[0]["tool_calls"][0]["function"]}
        if "tool_calls" in m
        else {"role": "function" if m["role"] == "tool" else m["role"], "content": m["content"]}
        for m in messages
    ]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


TOOLS = [TOOL]
SPLIT = {"prompt": slice(0, -1), "completion": slice(-1, None)}
ROWS = {
    "messages": lambda m: {"messages": m, "tools": TOOLS},
    "arguments as text": lambda m: {"messages": as_text_arguments(m), "tools": json.dumps(TOOLS)},
    "parts": lambda m: {"messages": as_parts(m), "tools": TOOLS},
    "bare tools": lambda m: {"messages": m, "tools": [TOOL["function"]]},
    "bare calls": lambda m: {
        "messages": [x | ({"tool_calls": [x["tool_calls"][0]["function"]]} if "tool_calls" in x else {}) for x in m],
        "functions": [TOOL["function"]],
    },
    "sharegpt": lambda m: {"conversations": as_sharegpt(m), "tools": json.dumps([TOOL["function"]])},
    "roles under conversations": lambda m: {"conversations": m, "tools": TOOLS},
    "names under messages": lambda m: {"messages": as_sharegpt(m), "tools": TOOLS},
    "old OpenAI": lambda m: {"messages": as_old_openai(m), "tools": TOOLS},
    "JSON text": lambda m: {"messages": json.dumps(m), "tools": json.dumps(TOOLS)},
    "system in a column": lambda m: {
        "system": m[0]["content"] if m[0]["role"] == "system" else None,
        "messages": m[1:] if m[0]["role"] == "system" else m,
        "tools": TOOLS,
    },
}


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


FILES = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(pyarrow.compress(jsonl(rows), "zstd", asbytes=True)),
    "rows.parquet": parquet,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


def encoded(path):
    documents = encode_rows(load_rows(str(path)), TOKENIZER, seq_len=100_000, max_bad_rows=0)
    return documents.ids, documents.scored


@pytest.mark.parametrize("form", ROWS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(conversations(), min_size=1, max_size=3))
def test_every_form_of_row_gives_the_same_ids_and_mask(form, drawn, tmp_path):
    expected, found = tmp_path / "expected.jsonl", tmp_path / "found.jsonl"
    expected.write_bytes(jsonl(ROWS["messages"](one) for one in drawn))
    found.write_bytes(jsonl(ROWS[form](one) for one in drawn))
    for one, other in zip(encoded(expected), encoded(found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(conversations(), min_size=1, max_size=3))
def test_every_kind_of_file_gives_the_same_ids_and_mask(file, drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = [ROWS["messages"](one) for one in [FIRST, *drawn]]
    (folder / "expected.jsonl").write_bytes(jsonl(rows))
    FILES[file](folder / file, rows)
    for one, other in zip(encoded(folder / "expected.jsonl"), encoded(folder / file), strict=True):
        np.testing.assert_array_equal(one, other)


def test_prompt_and_completion_as_messages_learn_the_completion_only(tmp_path):
    messages = [*FIRST, {"role": "user", "content": "more"}, {"role": "assistant", "content": "last"}]
    row = {name: messages[part] for name, part in SPLIT.items()} | {"tools": TOOLS}
    (tmp_path / "rows.jsonl").write_bytes(jsonl([row, ROWS["messages"](messages)]))
    split, whole = encode_rows(load_rows(str(tmp_path / "rows.jsonl")), TOKENIZER, seq_len=10_000)
    np.testing.assert_array_equal(split.ids, whole.ids)
    assert TOKENIZER.decode(split.ids[split.scored]) == "last<|im_end|>\n<eos>"
    assert TOKENIZER.decode(whole.ids[whole.scored]).endswith("a<|im_end|>last<|im_end|>\n<eos>")


@pytest.mark.parametrize("key", ["weight", "train"])
def test_messages_of_weight_zero_are_not_learned(key, tmp_path):
    messages = [
        {"role": "user", "content": "q", key: 0},
        {"role": "assistant", "content": "wrong", key: 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "right", key: True},
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([{"messages": messages}]))
    for template in ("qwen2_5", "qwen2_5_training"):
        tokenizer = build(TEMPLATES[template])
        (one,) = encode_rows(load_rows(str(tmp_path / "rows.jsonl")), tokenizer, seq_len=10_000)
        assert tokenizer.decode(one.ids[one.scored]).strip() == "right<|im_end|>\n<eos>"
        (whole,) = encode_rows(load_rows(str(tmp_path / "rows.jsonl")), tokenizer, seq_len=10_000, train_on="all")
        assert "wrong" in tokenizer.decode(whole.ids)
        assert "wrong" not in tokenizer.decode(whole.ids[whole.scored])


def test_alpaca_with_system_and_history(tmp_path):
    row = {"instruction": "say b", "output": "b", "system": "be brief", "history": [["say a", "a"]]}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say a"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "say b"},
        {"role": "assistant", "content": "b"},
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([row, {"messages": messages}]))
    alpaca, chat = encode_rows(load_rows(str(tmp_path / "rows.jsonl")), TOKENIZER, seq_len=10_000)
    np.testing.assert_array_equal(alpaca.ids, chat.ids)
    np.testing.assert_array_equal(alpaca.scored, chat.scored)
