"""Chats are rendered with the template that the asked model was trained with."""

import pytest

from qlora_jax.serve.http.service import Service
from tests.serve.http.fake import BASE, MAX_LENGTH

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
OWN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def service(engine, tokenizer):
    def template_of(model: str):
        if model == "poet":
            raise ValueError("chat_template.jinja is no UTF-8 text")
        return {"cook": OWN, "endless": ENDLESS}.get(model)

    sizes = dict(base=BASE, max_length=MAX_LENGTH, vocabulary=2048)
    service = Service(engine, tokenizer, **sizes, chat_template_of=template_of)
    yield service
    service.close()


def test_each_model_has_its_own(client, tokenizer):
    def prompt_tokens(model: str) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        return client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert prompt_tokens(BASE) == len(rendered["input_ids"])
    assert prompt_tokens("cook") == len(tokenizer("<user>hi", add_special_tokens=False)["input_ids"])
    assert prompt_tokens(BASE) != prompt_tokens("cook")


def test_one_that_cannot_be_read_fails_its_own_chats_only(client):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    refused = client.post("/v1/chat/completions", json={"model": "poet", **body})
    assert refused.status_code == 400
    assert "chat template of 'poet' cannot be read" in refused.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json={"model": BASE, **body}).status_code == 200
    assert client.post("/v1/completions", json={"model": "poet", "prompt": "hi"}).status_code == 200


def test_one_that_does_not_end_holds_up_nobody_for_long(client, service, engine, monkeypatch):
    engine.scripts["endless"] = [5]
    monkeypatch.setattr(service._isolated, "_seconds", 0.5)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for _ in range(3):
        refused = client.post("/v1/chat/completions", json={"model": "endless", **body})
        assert refused.status_code == 400
        assert "takes more than 0.5 seconds" in refused.json()["error"]["message"]
    for model in ("cook", BASE):
        assert client.post("/v1/chat/completions", json={"model": model, **body}).status_code == 200
