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
    assert "user\none\ntwo<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>" in tokenizer.decode(
        engine.requests[0].prompt
    )


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
