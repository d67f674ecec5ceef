"""POST /v1/completions."""

import json
import math

import pytest

from tests.serve.http.fake import BASE

HI = [{"role": "user", "content": "Hi"}]


def test_base_and_adapters_by_name(post, engine):
    answer = post("completions", model=BASE, prompt="Hi", max_tokens=30)
    [choice] = answer["choices"]
    assert choice == {"index": 0, "text": " the base says café", "logprobs": None, "finish_reason": "stop"}
    assert (answer["object"], answer["model"], answer["id"][:5]) == ("text_completion", BASE, "cmpl-")
    assert post("completions", model="poet", prompt="Hi")["choices"][0]["text"] == " rose\nis a rose"
    assert [request.adapter for request in engine.requests] == [None, "poet"]
    assert [request.max_new_tokens for request in engine.requests] == [30, 16]


def test_usage_counts_tokens(post, engine):
    answer = post("completions", model="poet", prompt=["one two", "three"], n=2)
    lengths = [len(request.prompt) for request in engine.requests[::2]]  # a prompt counts once
    given = sum(lengths)
    assert answer["usage"] == {
        "prompt_tokens": given,
        "completion_tokens": 4 * 7,
        "total_tokens": given + 28,
        "prompt_tokens_details": {"cached_tokens": sum(length // 2 for length in lengths)},
    }


def test_sampling_reaches_the_engine(post, engine, tokenizer):
    post("completions", model=BASE, prompt="Hi", temperature=0.5, top_p=0.9, top_k=7, seed=3)
    [request] = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, request.seed) == (0.5, 0.9, 7, 3)
    assert request.prompt == tuple(tokenizer("Hi")["input_ids"])
    assert request.prompt[0] == 1 and request.prompt[-1] != 2  # opened, not closed


def test_what_is_left_out_is_as_with_openai(post, engine):
    post("completions", model=BASE, prompt="Hi", temperature=None, n=None, stop=None, logit_bias=None, user="me")
    post("completions", model=BASE, prompt="Hi")
    first, second = engine.requests
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.seed != second.seed


def test_n_choices_have_seeds_that_count_up(post, engine):
    answer = post("completions", model=BASE, prompt=["a", "b"], n=3, seed=-1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [request.seed for request in engine.requests] == [2**64 - 1, 0, 1] * 2
    assert len({request.prompt for request in engine.requests[:3]}) == 1
    assert len({request.prompt for request in engine.requests}) == 2


def test_every_kind_of_prompt(post, engine):
    post("completions", model=BASE, prompt=[5, 6])
    post("completions", model=BASE, prompt=[[5], [6, 7]])
    post("completions", model=BASE, prompt=["a", "b"])
    assert [request.prompt for request in engine.requests[:3]] == [(5, 6), (5,), (6, 7)]
    assert len(engine.requests) == 5


def test_stop_string_across_tokens_ends_the_generation(post, engine, stream):
    [choice] = post("completions", model="cook", prompt="x", stop=["nd 🍳", "never"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" stir – a", "stop")
    events = stream("completions", model="cook", prompt="x", stop="nd 🍳")
    assert "".join(event["choices"][0]["text"] for event in events) == " stir – a"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert engine.is_idle()
    assert all(ticket.said <= 13 for ticket in engine.tickets)


def test_a_stop_string_gives_the_slot_back(post, engine):
    engine.scripts["poet"] = list(engine.scripts["poet"]) * 20
    engine.pace = 0.01
    answer = post("completions", model="poet", prompt="x", stop="is", max_tokens=140)
    assert answer["choices"][0]["text"] == " rose\n"
    assert answer["usage"]["completion_tokens"] == 4
    assert engine.tickets[0].cancelled and engine.tickets[0].said < 100


def test_length(post):
    [choice] = post("completions", model="poet", prompt="x", max_tokens=2)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" rose", "length")


def test_stream_is_the_same_text_in_parts(stream):
    events = stream("completions", model="cook", prompt="x", max_tokens=30)
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == " stir – and 🍳 fry"
    assert "🍳" in texts and "\ufffd" not in "".join(texts)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert len({event["id"] for event in events}) == 1
    assert "usage" not in events[0]


def test_stream_ends_with_the_counts_where_wanted(stream):
    events = stream("completions", model="poet", prompt="x", n=2, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 14
    texts = ["", ""]
    for event in events[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [" rose\nis a rose"] * 2


def test_echo_scores_the_prompt(post, tokenizer):
    ids = tokenizer("Hi é", add_special_tokens=False)["input_ids"]
    [choice] = post("completions", model="cook", prompt=ids, echo=True, logprobs=1, max_tokens=1)["choices"]
    assert choice["text"] == "Hi é s"
    assert choice["logprobs"] == {
        "tokens": ["H", "i", " ", "bytes:\\xc3", "bytes:\\xa9", " s"],
        "token_logprobs": [None, -1, -2, -3, -4, -1],
        "top_logprobs": [None, {"i": -1}, {" ": -2}, {"bytes:\\xc3": -3}, {"bytes:\\xa9": -4}, {" s": -1}],
        "text_offset": [0, 1, 2, 3, 3, 4],
    }


def test_echo_alone_and_nothing_generated(post):
    [choice] = post("completions", model="cook", prompt="Hi é", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("Hi é", "length", None)
    [choice] = post("completions", model="cook", prompt="Hi", echo=True, max_tokens=0, logprobs=0)["choices"]
    assert choice["logprobs"]["tokens"] == ["<|begin|>", "H", "i"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1, -2]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_echo_in_a_stream(stream):
    events = stream("completions", model="cook", prompt="Hi", echo=True, logprobs=0, max_tokens=2)
    choices = [event["choices"][0] for event in events]
    assert [choice["text"] for choice in choices] == ["Hi", " s", "ti", ""]
    assert [choice["logprobs"] and choice["logprobs"]["text_offset"] for choice in choices] == [
        [0, 0, 1],
        [2],
        [4],
        None,
    ]


def test_a_stop_token_is_listed_so_that_a_harness_finds_its_last_place(post, engine, tokenizer):
    """lm-evaluation-harness asks for one new token and leaves out the last entry of every list, whatever it is."""
    engine.scripts["cook"] = []
    ids = tokenizer("Hi there", add_special_tokens=False)["input_ids"]
    [choice] = post("completions", model="cook", prompt=[ids], echo=True, logprobs=1, max_tokens=1)["choices"]
    scores = choice["logprobs"]
    assert scores["tokens"][-1] == "<|im_end|>" and choice["text"] == "Hi there"
    assert {len(values) for values in scores.values()} == {len(ids) + 1}
    context = 2
    assert math.isclose(sum(scores["token_logprobs"][context:-1]), -sum(range(2, len(ids))))


def test_the_chosen_token_is_always_among_the_likeliest(post, engine, monkeypatch):
    from tests.serve.http import fake

    unlikely = lambda self, place, token: fake.Token(token, -9.0, ((40, -0.5), (41, -1.0)))  # noqa: E731
    monkeypatch.setattr(fake.Ticket, "_scored", unlikely)
    [choice] = post("completions", model="poet", prompt="x", logprobs=2, max_tokens=1)["choices"]
    first, second = (engine_text for engine_text in list(choice["logprobs"]["top_logprobs"][0])[:2])
    assert choice["logprobs"]["top_logprobs"] == [{first: -0.5, second: -1.0, " ro": -9.0}]


def test_an_adapter_that_cannot_be_served_is_the_requests_fault(client):
    response = client.post("/v1/completions", json={"model": "poisoned", "prompt": "x"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_servable")
    assert "its weights are not finite" in error["message"]


def test_a_failure_is_an_error_whole_and_in_a_stream(client):
    response = client.post("/v1/completions", json={"model": "broken", "prompt": "x"})
    assert response.status_code == 500
    expected = {"message": "the generation failed: the adapter is broken", "type": "server_error", "param": None}
    assert response.json() == {"error": {**expected, "code": None}}
    response = client.post("/v1/completions", json={"model": "broken", "prompt": "x", "stream": True})
    assert (response.status_code, response.json()) == (500, {"error": {**expected, "code": None}})
    response = client.post("/v1/completions", json={"model": "dying", "prompt": "x", "stream": True})
    assert response.status_code == 200
    first, last, rest = response.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == " ro"
    assert last.startswith('data: {"error": {"message": "the generation failed: the adapter died"')
    assert rest == ""  # no [DONE]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_before_its_first_token_has_a_status_of_its_own(client, path, stream):
    body = {"model": "poisoned", "prompt": "x"} if path == "completions" else {"model": "poisoned", "messages": HI}
    response = client.post(f"/v1/{path}", json={**body, "stream": stream})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "model_not_servable"


def test_an_event_is_one_line_for_every_client(client):
    """httpx ends lines where Unicode does, and so do others."""
    text = "a\u2028b\u2029c\u0085d"
    body = {"model": BASE, "prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text
