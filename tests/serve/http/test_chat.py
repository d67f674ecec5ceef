"""POST /v1/chat/completions."""

import pytest

from tests.serve.http.fake import BASE, MAX_LENGTH

HI = [{"role": "user", "content": "Hi"}]


def test_the_template_makes_the_prompt(post, engine, tokenizer):
    messages = [{"role": "system", "content": "Be kind"}, *HI]
    answer = post("chat/completions", model="poet", messages=messages)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " rose\nis a rose", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"], answer["object"]) == ("stop", None, "chat.completion")
    [request] = engine.requests
    expected = "<|begin|><|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(request.prompt) == expected
    assert request.prompt.count(1) == 1  # one bos, the template's
    assert request.max_new_tokens == MAX_LENGTH - len(request.prompt)


def test_content_in_parts_and_turns_of_before(post, engine, tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": None}
    post("chat/completions", model=BASE, messages=[{"role": "user", "content": parts}, said, *HI], max_tokens=1)
    prompt = tokenizer.decode(engine.requests[0].prompt)
    assert "user\nonetwo<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>" in prompt


def test_the_newer_name_of_the_limit_counts(post, engine):
    post("chat/completions", model=BASE, messages=HI, max_tokens=3, max_completion_tokens=2)
    post("chat/completions", model=BASE, messages=HI, max_tokens=3)
    assert [request.max_new_tokens for request in engine.requests] == [2, 3]


@pytest.mark.parametrize("choice, seen", [(None, True), ("auto", True), ("none", False)])
def test_tools_reach_the_template(post, engine, service, tokenizer, monkeypatch, choice, seen):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    post("chat/completions", model=BASE, messages=HI, tools=tools, tool_choice=choice, max_tokens=1)
    assert ("weather" in tokenizer.decode(engine.requests[0].prompt)) == seen


def test_log_probabilities(post):
    [choice] = post("chat/completions", model="cook", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2)[
        "choices"
    ]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == (" s", -1, [32, 115])
    assert [top["logprob"] for top in second["top_logprobs"]] == [-2, -3]
    [choice] = post("chat/completions", model="cook", messages=HI, logprobs=True, max_tokens=1)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    [choice] = post("chat/completions", model="poet", messages=HI, logprobs=True)["choices"]
    listed = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert listed == choice["message"]["content"] == " rose\nis a rose"


def test_stream(stream):
    events = stream(
        "chat/completions", model="poet", messages=HI, n=2, stop="is", stream_options={"include_usage": True}
    )
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in range(2):
        deltas = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(delta["delta"].get("content", "") for delta in deltas) == " rose\n"
        assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "stop")
    assert events[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "no chat template"),
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),  # the sandbox
    ],
)
def test_a_template_that_cannot(client, service, monkeypatch, template, words):
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    response = client.post("/v1/chat/completions", json={"model": BASE, "messages": HI})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert words in response.json()["error"]["message"]


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}(at once){% endif %}"
)
CITY = {"city": "Paris", "unit": None}


@pytest.fixture
def prompt_of(post, engine, service, tokenizer, monkeypatch):
    """`prompt_of(template, messages)`: the text that the engine is given; None keeps the tokenizer's own template."""

    def ask(template, messages, **fields):
        if template is not None:
            monkeypatch.setattr(service.tokenizer, "chat_template", template)
        post("chat/completions", model=BASE, messages=messages, max_tokens=1, **fields)
        return tokenizer.decode(engine.requests[-1].prompt)

    return ask


@pytest.mark.parametrize("arguments", ['{"city": "Paris", "unit": null}', CITY], ids=["text", "object"])
def test_calls_are_turned_into_the_templates_form(prompt_of, arguments):
    """Templates write the arguments as JSON themselves: a text would be written as a text within a text."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    said = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    said.append({"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    assert prompt_of(CALLS, said) == '[user]Hi[assistant]weather{"city": "Paris", "unit": null}[tool]sunny'


def test_a_developer_is_the_system_of_a_template_that_knows_no_other(prompt_of):
    said = [{"role": "developer", "content": "Be brief"}, *HI]
    assert "<|im_start|>system\nBe brief<|im_end|>" in prompt_of(None, said)
    assert prompt_of(CALLS, said) == "[system]Be brief[user]Hi"
    assert prompt_of(CALLS + "{% if 0 %}developer{% endif %}", said) == "[developer]Be brief[user]Hi"


def test_variables_reach_the_template(prompt_of):
    assert prompt_of(CALLS, HI, chat_template_kwargs={"enable_thinking": False}) == "[user]Hi(at once)"
    assert prompt_of(CALLS, HI, chat_template_kwargs={"enable_thinking": True}) == "[user]Hi"
    assert prompt_of(CALLS, HI, chat_template_kwargs=None) == "[user]Hi"


TOOL = {"type": "function", "function": {"name": "weather", "description": "how it is outside"}}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tools": [TOOL]}, "leaves out tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0] must be an object"),
        ({"messages": [{"role": "assistant", "tool_calls": [TOOL]}]}, "leaves out"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "cannot be set here"),
    ],
    ids=str,
)
def test_what_the_template_would_leave_out_is_refused(client, engine, fields, words):
    response = client.post("/v1/chat/completions", json={"model": BASE, "messages": HI, **fields})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert engine.requests == []


def test_tools_that_nobody_wants_need_no_place(prompt_of):
    assert "weather" not in prompt_of(None, HI, tools=[TOOL], tool_choice="none")


def test_an_eos_that_the_user_wrote_stays(post, engine, tokenizer):
    """And one that the tokenizer would add does not come."""
    for prompt in ("Hi" + tokenizer.eos_token, tokenizer.eos_token, "Hi"):
        post("completions", model=BASE, prompt=prompt, max_tokens=1)
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert list(engine.requests[-1].prompt)[-len(expected) :] == expected
