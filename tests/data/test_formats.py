import pytest

from qlora_jax.data import Chat, Completion, Row, Text, to_example

USER_HI = {"role": "user", "content": "hi"}
ASSISTANT_HELLO = {"role": "assistant", "content": "hello"}


def read(values, *, alpaca_as_chat=False):
    return to_example(Row(values=values, origin="train.jsonl, row 17"), alpaca_as_chat=alpaca_as_chat)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "hi"}, Text(text="hi")),
        ({"text": ""}, Text(text="")),
        ({"prompt": "hi", "completion": "hello"}, Completion(prompt="hi", completion="hello")),
        ({"messages": [USER_HI, ASSISTANT_HELLO]}, Chat(messages=[USER_HI, ASSISTANT_HELLO])),
        (
            {"messages": [{**USER_HI, "name": None}], "tools": [{"name": "add"}]},
            Chat(messages=[USER_HI], tools=[{"name": "add"}]),
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]},
            Chat(messages=[{"role": "assistant", "tool_calls": [{"name": "add"}]}]),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "brief"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "hello"},
                    {"from": "user", "value": "hi"},
                    {"from": "assistant", "value": "hello"},
                ]
            },
            Chat(
                messages=[
                    {"role": "system", "content": "brief"},
                    USER_HI,
                    ASSISTANT_HELLO,
                    USER_HI,
                    ASSISTANT_HELLO,
                ]
            ),
        ),
        # the most structured format wins, and null columns (mixed files through Arrow) are absent
        ({"text": "x", "prompt": "hi", "completion": "hello"}, Completion(prompt="hi", completion="hello")),
        ({"text": "x", "messages": None}, Text(text="x")),
        ({"prompt": "x", "messages": [USER_HI]}, Chat(messages=[USER_HI])),
    ],
)
def test_a_row_decides_its_format(values, expected):
    assert read(values) == expected


def test_alpaca_as_a_chat():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "the same, rendered"}
    assert read(row, alpaca_as_chat=True) == Chat(
        messages=[{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    )
    assert read({**row, "input": ""}, alpaca_as_chat=True).messages[0]["content"] == "Add."


def test_alpaca_as_a_prompt():
    assert read({"instruction": "Say {hi}.", "output": "hi"}) == Completion(
        prompt="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}.\n\n### Response:\n",
        completion="hi",
    )
    assert read({"instruction": "Add.", "input": "1 2", "output": "3"}).prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"question": "hi", "answer": None},
            "train.jsonl, row 17: found the columns question, answer (null counts as absent); a row needs "
            '{"text"}, {"prompt", "completion"}, {"messages"}, {"instruction", "output", optional "input"} '
            '(Alpaca) or {"conversations"} (ShareGPT)',
        ),
        (
            {"prompt": "hi"},
            "train.jsonl, row 17: found the columns prompt (null counts as absent); a row needs ",
        ),
        ({}, "train.jsonl, row 17: found the columns none (null counts as absent); a row needs "),
        ({"text": 3}, "train.jsonl, row 17: column 'text' must be a string, found int 3"),
        (
            {"prompt": [USER_HI], "completion": "x"},
            "train.jsonl, row 17: column 'prompt' must be a string, found list [{'role': 'user', 'content': 'hi'}]",
        ),
        (
            {"instruction": "x", "input": 1, "output": "y"},
            "train.jsonl, row 17: column 'input' must be a string, found int 1",
        ),
        (
            {"messages": "hi"},
            "train.jsonl, row 17: column 'messages' must be a non-empty list of objects, found str 'hi'",
        ),
        (
            {"messages": []},
            "train.jsonl, row 17: column 'messages' must be a non-empty list of objects, found list []",
        ),
        (
            {"messages": [USER_HI, {"role": "assistant", "content": None}]},
            'train.jsonl, row 17: messages[1] needs "role" and "content", found role',
        ),
        (
            {"messages": [{"role": "user", "content": ["hi"]}]},
            "train.jsonl, row 17: messages[0].content must be a string, found list ['hi']",
        ),
        (
            {"conversations": [{"role": "user", "content": "hi"}]},
            'train.jsonl, row 17: conversations[0] needs "from" and "value", found role, content',
        ),
        (
            {"conversations": [{"from": "bot", "value": "hi"}]},
            "train.jsonl, row 17: conversations[0]: unknown speaker 'bot'; "
            "expected one of human, user, gpt, assistant, system",
        ),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            "train.jsonl, row 17: conversations[0].value must be a string, found NoneType None",
        ),
    ],
)
def test_bad_rows_name_file_row_and_expectation(values, expected):
    with pytest.raises(ValueError) as error:
        read(values)
    assert str(error.value).startswith(expected)
