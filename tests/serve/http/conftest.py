import json
import pathlib

import httpx
import pytest

from qlora_jax.data import load_tokenizer
from qlora_jax.serve.http.service import Service
from tests.serve.http.fake import BASE, MAX_LENGTH, FakeEngine
from tests.serve.http.live import serving

DEMO = pathlib.Path(__file__).parents[3] / "demo" / "base"
# Characters of one to four bytes, which the tokenizer mostly splits into single bytes.
SAYINGS = {None: " the base says café", "cook": " stir – and 🍳 fry", "poet": " rose\nis a rose"}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(DEMO))


@pytest.fixture
def engine(tokenizer):
    scripts = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in SAYINGS.items()}
    engine = FakeEngine(scripts)
    yield engine
    engine.close()


@pytest.fixture
def service(engine, tokenizer):
    service = Service(engine, tokenizer, base=BASE, max_length=MAX_LENGTH, vocabulary=2048)
    yield service
    service.close()


@pytest.fixture
def url(service):
    with serving(service) as url:
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def post(client):
    """`post(path, **fields)`: the answer's JSON, which must be a good one."""

    def send(path: str, **fields):
        response = client.post(f"/v1/{path}", json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    return send


@pytest.fixture
def stream(client):
    """`stream(path, **fields)`: the events of a stream; the last line is checked and left out."""

    def send(path: str, **fields) -> list[dict]:
        response = client.post(f"/v1/{path}", json={**fields, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, last, rest = response.text.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    return send
