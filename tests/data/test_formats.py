import pytest

from qlora_jax.data import Chat, Completion, Row, Text, to_example

USER_HI = {"role": "user", "content": "hi"}
ASSISTANT_HELLO = {"role": "assistant", "content": "hello"}
ADD = {"type": "function", "function": {"name": "add", "arguments": {}}}


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
            Chat(messages=[USER_HI], tools=[{"type": "function", "function": {"name": "add"}}]),
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]},
            Chat(messages=[{"role": "assistant", "content": "", "tool_calls": [ADD]}]),
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
            "found the columns question; a row needs "
            '{"text"}, {"prompt", "completion"}, {"messages"}, {"instruction", "output", optional "input"} '
            '(Alpaca) or {"conversations"} (ShareGPT)',
        ),
        ({"prompt": "hi"}, "found the columns prompt; a row needs "),
        ({}, "found the columns none; a row needs "),
        ({"text": 3}, "column 'text' must be a string, found int 3"),
        ({"text": "\ud800"}, "column 'text': character 0 is half a surrogate pair, which is no Unicode"),
        ({"prompt": [USER_HI], "completion": "x"}, "completion is text, but not the JSON of an object or a list: 'x'"),
        ({"instruction": "x", "input": 1, "output": "y"}, "column 'input' must be a string, found int 1"),
        ({"messages": "hi"}, "messages is text, but not the JSON of an object or a list: 'hi'"),
        ({"messages": []}, "messages must be a non-empty list of objects, found list []"),
        ({"messages": {"role": "user"}}, "messages must be a non-empty list of objects, found dict {'role': 'user'}"),
        ({"messages": ["hi"]}, "messages[0] must be an object, found str 'hi'"),
        (
            {"messages": [USER_HI, {"role": "assistant", "content": None}]},
            'messages[1] needs "role" and "content", found role',
        ),
        (
            {"messages": [{"role": "user", "content": ["hi"]}]},
            "messages[0].content[0] must be a part of text, found str 'hi'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0] must be a part of text, found a part of type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content: character 0 is half a surrogate"),
        (
            {"messages": [{"role": ["user"], "content": "hi"}]},
            "messages[0]: ['user'] is no known role; expected one of ",
        ),
        (
            {"conversations": [{"from": "robot", "value": "hi"}]},
            "conversations[0]: 'robot' is no known role; expected ",
        ),
        (
            {"conversations": [{"from": "human", "role": "assistant", "value": "hi"}]},
            "conversations[0] has both 'role' and 'from', and they differ: leave one out",
        ),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            'conversations[0] needs "role" and "content", found from',
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add 1 and 2"}]},
            "conversations[0].value is text, but not the JSON of an object or a list: 'add 1 and 2'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "[1]"}]}]},
            "messages[0].tool_calls[0]: arguments must be a JSON object, found list [1]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{" * 100_000}]}]},
            "messages[0].tool_calls[0]: arguments is text, but not the JSON of an object or a list: ",
        ),
        ({"messages": [USER_HI], "tools": [{}]}, 'tools[0] must be an object with a "name", found dict {}'),
        ({"messages": [USER_HI], "tools": 3}, "tools must be a list of tools, found int 3"),
        (
            {"messages": [{**USER_HI, "weight": 0.5}]},
            'messages[0]: "weight" and "train" must be 0 or 1, and not differ; found [0.5]',
        ),
        (
            {"messages": [{**USER_HI, "weight": 1}]},
            "messages[0]: only what the assistant says can be learned, not a 'user' message",
        ),
        (
            {"messages": [USER_HI], "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs: messages cannot be set here",
        ),
        (
            {"messages": [{"role": "system", "content": "brief"}, USER_HI], "system": "be long"},
            "column 'system' and the first message differ: leave one out",
        ),
        (
            {"text": "hi", "system": "be brief"},
            "a row of the form text with 'system', which is not read there: leave it out, or use a chat",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            "a row of the form Alpaca without a chat template with 'history', which is not read there",
        ),
        ({"messages": [USER_HI], "weight": 0.5}, "a row of the form messages with 'weight', which is not read there"),
        ({"messages": [USER_HI], "images": ["a.png"]}, "a row of the form messages with 'images', which is not read"),
    ],
)
def test_bad_rows_name_file_row_and_expectation(values, expected):
    with pytest.raises(ValueError) as error:
        read(values)
    assert str(error.value).startswith(f"train.jsonl, row 17: {expected}")
