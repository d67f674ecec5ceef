"""Every malformed request gets an error in OpenAI's shape that names the field."""

import json

import httpx
import pytest

from qlora_jax.serve.http import errors
from qlora_jax.serve.http.service import Service
from tests.serve.http.fake import BASE, MAX_LENGTH, FakeEngine
from tests.serve.http.live import serving

HI = [{"role": "user", "content": "Hi"}]
WORDS = "0123456789" * 30

# (fields beside model and prompt, the field that is named, words of the message)
COMPLETIONS = {
    "no prompt": ({"prompt": None}, "prompt", "expected a text"),
    "empty list": ({"prompt": []}, "prompt", "expected a text"),
    "empty list of ids": ({"prompt": [[]]}, "prompt", "expected a text"),
    "mixed list": ({"prompt": ["a", 1]}, "prompt", "expected a text"),
    "prompt of another type": ({"prompt": {"a": 1}}, "prompt", "expected a text"),
    "negative id": ({"prompt": [-1]}, "prompt", "expected a text"),
    "boolean id": ({"prompt": [True]}, "prompt", "expected a text"),
    "id beyond the vocabulary": ({"prompt": [2048]}, "prompt", "2048 is no token id: the model has 2048"),
    "huge id": ({"prompt": [10**30]}, "prompt", "expected a text"),
    "too many prompts": ({"prompt": ["a"] * 65}, "prompt", "at most 64 prompts"),
    "too long": ({"prompt": WORDS}, "prompt", "301 tokens and 16 new ones exceed 200"),
    "too many tokens": ({"max_tokens": 199}, "prompt", "2 tokens and 199 new ones exceed 200"),
    "no model": ({"model": None}, "model", "string"),
    "model of another type": ({"model": 3}, "model", "string"),
    "empty model": ({"model": ""}, "model", "at least 1"),
    "long model": ({"model": "a" * 129}, "model", "at most 128"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    "nothing wanted": ({"max_tokens": 0}, "max_tokens", "needs echo"),
    "max_tokens a text": ({"max_tokens": "5"}, "max_tokens", "integer"),
    "max_tokens a fraction": ({"max_tokens": 1.5}, "max_tokens", "integer"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens", "integer"),
    "max_tokens huge": ({"max_tokens": 2**40}, "max_tokens", "less than"),
    "hot": ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    "cold": ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    "almost greedy": ({"temperature": 5e-324}, "temperature", "0 (greedy) or at least 0.0001"),
    "temperature a text": ({"temperature": "1"}, "temperature", "number"),
    "top_p 0": ({"top_p": 0}, "top_p", "greater than 0"),
    "top_p 2": ({"top_p": 2}, "top_p", "less than or equal to 1"),
    "top_k negative": ({"top_k": -1}, "top_k", "greater than or equal to 0"),
    "seed a text": ({"seed": "x"}, "seed", "integer"),
    "seed huge": ({"seed": 2**63}, "seed", "less than"),
    "n 0": ({"n": 0}, "n", "greater than or equal to 1"),
    "n 17": ({"n": 17}, "n", "less than or equal to 16"),
    "empty stop": ({"stop": ""}, "stop", "1 to 256 characters"),
    "empty stop in a list": ({"stop": ["a", ""]}, "stop", "1 to 256 characters"),
    "long stop": ({"stop": "a" * 257}, "stop", "1 to 256 characters"),
    "many stops": ({"stop": ["a"] * 17}, "stop", "at most 16"),
    "stop of another type": ({"stop": 5}, "stop", "at most 16"),
    "logprobs 21": ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    "logprobs true": ({"logprobs": True}, "logprobs", "integer"),
    "echo a text": ({"echo": "yes"}, "echo", "boolean"),
    "best_of": ({"best_of": 4}, "best_of", "best_of=4 is not supported"),
    "stream a number": ({"stream": 1}, "stream", "boolean"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    "stream_options a list": ({"stream": True, "stream_options": []}, "stream_options", "dictionary"),
    "logit_bias": ({"logit_bias": {"5": 100}}, "logit_bias", "not supported"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    "presence_penalty": ({"presence_penalty": 1}, "presence_penalty", "not supported"),
    "suffix": ({"suffix": "end"}, "suffix", "not supported"),
    "unknown field": ({"max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
    "strange field": ({"xyzzy": 5}, "xyzzy", "known are best_of, echo, logprobs"),
}
CHATS = {
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "messages a text": ({"messages": "Hi"}, "messages", "list"),
    "message a text": ({"messages": ["Hi"]}, "messages.0", "dictionary"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages.0.role", "required"),
    "strange role": ({"messages": [*HI, {"role": "root", "content": "Hi"}]}, "messages.1.role", "'system'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0", "needs content"),
    "content a number": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages.0.content",
        "expected a text or a list",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
        '{"type": "text"',
    ),
    "many messages": ({"messages": HI * 1025}, "messages", "at most 1024"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "logprobs a number": ({"logprobs": 1}, "logprobs", "boolean"),
    "top_logprobs alone": ({"top_logprobs": 1}, "top_logprobs", "needs logprobs=true"),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    "tools a text": ({"tools": "x"}, "tools", "list"),
    "a call that is forced": ({"tool_choice": "required"}, "tool_choice", "not supported"),
    "calls one at a time": ({"parallel_tool_calls": False}, "parallel_tool_calls", "not supported"),
    "JSON answers": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    "many variables": ({"chat_template_kwargs": {f"v{i}": i for i in range(65)}}, "chat_template_kwargs", "at most 64"),
    "a message of many fields": (
        {"messages": [{**HI[0], **{f"f{i}": i for i in range(65)}}]},
        "messages.0",
        "at most 64 other fields",
    ),
    "echo in a chat": ({"echo": True}, "echo", "known are"),
}


@pytest.fixture(scope="module")
def engine(tokenizer):
    """One for the whole file: nothing gets as far as the engine."""
    engine = FakeEngine({None: [5], "cook": [5], "poet": [5]})
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine, tokenizer):
    service = Service(engine, tokenizer, base=BASE, max_length=MAX_LENGTH, vocabulary=2048)
    with serving(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def check(response, param, words):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert words in error["message"]


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(client, engine, name):
    fields, param, words = COMPLETIONS[name]
    check(client.post("/v1/completions", json={"model": BASE, "prompt": "a", **fields}), param, words)
    assert engine.requests == []


@pytest.mark.parametrize("name", CHATS)
def test_chats(client, engine, name):
    fields, param, words = CHATS[name]
    check(client.post("/v1/chat/completions", json={"model": BASE, "messages": HI, **fields}), param, words)
    assert engine.requests == []


BODIES = {
    "empty": (b"", 400, "JSON"),
    "half": (b'{"model": ', 400, "no valid JSON"),
    "list": (b"[]", 400, "must be a JSON object"),
    "number": (b"1", 400, "must be a JSON object"),
    "null": (b"null", 400, "JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "cannot be parsed"),
    "deep": (b"[" * 100_000, 400, "100,000 lists and objects, at most 50,000"),
    "deep value": (b'{"user": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "nested 901 deep, at most 64"),
    "long number": (b'{"n": ' + b"1" * 5000 + b"}", 400, "cannot be parsed"),
    "not a number": (b'{"model": "x", "prompt": "a", "temperature": NaN}', 400, "finite"),
    "half a surrogate pair": (b'{"model": "demo-base", "prompt": "\\ud83c"}', 400, "half a surrogate pair"),
    "half a pair in a name": (b'{"model": "\\ud83c", "prompt": "a"}', 400, "unicode"),
    "half a pair in a field": (b'{"model": "demo-base", "prompt": "a", "\\ud83c": 1}', 400, "a field's name"),
    "too large": (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', 413, "larger than 4194304 bytes"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(client, name):
    body, status, words = BODIES[name]
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]


def test_a_body_without_a_length_is_cut_off_too(client):
    chunks = (b"x" * (1 << 20) for _ in range(5))
    response = client.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_half_a_surrogate_pair_in_a_chat(client):
    body = b'{"model": "demo-base", "messages": [{"role": "user", "content": "\\ud83c"}]}'
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    check(response, "messages", "half a surrogate pair")


def test_an_unknown_model_lists_what_is_served(client, engine, monkeypatch):
    for fields in ({"prompt": "a"}, {"prompt": ["a", "b"], "n": 2, "stream": True}):
        response = client.post("/v1/completions", json={"model": "nope", **fields})
        assert response.status_code == 404
        assert response.json()["error"] == {
            "message": "no model 'nope' is served; served are demo-base, cook, poet",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    monkeypatch.setattr(engine, "scripts", engine.scripts | {f"more-{i}": [] for i in range(1000)})
    message = client.post("/v1/completions", json={"model": "nope", "prompt": "a"}).json()["error"]["message"]
    assert message.endswith("more-16 and 983 more")


@pytest.mark.parametrize(
    "method, path, status, words",
    [
        ("GET", "/v1/nothing", 404, "nothing is served at /v1/nothing"),
        ("GET", "/v1/completions", 405, "GET is not allowed at /v1/completions"),
        ("DELETE", "/v1/models", 405, "DELETE is not allowed"),
        ("GET", "/v1/models/nope", 404, "no model 'nope' is served"),
        ("POST", "/v1/completions", 415, "Content-Type: application/json"),
    ],
)
def test_paths_and_methods(client, method, path, status, words):
    response = client.request(method, path)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert response.headers.get("allow") == {"/v1/completions": "POST", "/v1/models": "GET"}.get(
        path if status == 405 else ""
    )


def _chat(**fields):
    return {"model": BASE, "messages": HI, **fields}


# What would take seconds and gigabytes, were an error made for each member; each is less than 4 MiB.
LARGE = {
    "content": _chat(messages=[{"role": "user", "content": [1] * 1_000_000}]),
    "more content": _chat(messages=[{"role": "user", "content": [1] * 1_900_000}]),
    "parts": _chat(messages=[{"role": "user", "content": [{}] * 40_000}]),
    "messages": _chat(messages=[{}] * 49_000),
    "calls": _chat(messages=[{"role": "assistant", "tool_calls": [1] * 1_000_000}]),
    "tools": _chat(tools=["a"] * 900_000),
    "stop": _chat(stop=["a"] * 900_000),
    "fields": _chat(**{f"f{i}": 0 for i in range(49_000)}),
    "more fields": _chat(**{f"f{i}": 0 for i in range(300_000)}),
    "bias": _chat(logit_bias={str(i): 1 for i in range(300_000)}),
    "lists": _chat(metadata=[[]] * 1_000_000),
    "prompts": {"model": BASE, "prompt": ["a"] * 900_000},
    "prompts of ids": {"model": BASE, "prompt": [[1]] * 900_000},
    "a mixture": {"model": BASE, "prompt": [*([1] * 1_000_000), "a"]},
}


@pytest.mark.parametrize("name", LARGE)
def test_no_error_is_made_for_each_of_a_million(client, service, name, monkeypatch):
    made = []
    body = json.dumps(LARGE[name], separators=(",", ":"))
    assert len(body) < 4 << 20
    monkeypatch.setattr(errors, "from_validation", lambda found, known: made.append(len(found)) or KEEP(found, known))
    path = "completions" if "prompt" in LARGE[name] else "chat/completions"
    response = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert sum(made) < 10
    assert len(response.text) < 1000


KEEP = errors.from_validation
