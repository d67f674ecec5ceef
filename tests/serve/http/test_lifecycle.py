"""Clients that leave, a full queue, and the way down."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from qlora_jax.serve.http.server import listen, url_of
from qlora_jax.serve.request import Request
from tests.serve.http.fake import BASE
from tests.serve.http.live import running


@pytest.fixture
def slow(engine):
    """An engine with a long answer, a hundredth of a second a token."""
    engine.scripts["poet"] = list(engine.scripts["poet"]) * 20
    engine.pace = 0.01
    return engine


def test_leaving_a_stream_frees_its_slots(client, slow):
    body = {"model": "poet", "prompt": "x", "stream": True, "max_tokens": 140, "n": 2}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert slow.is_idle()
    assert [ticket.cancelled for ticket in slow.tickets] == [True, True]


def test_leaving_before_the_answer_frees_its_slots(url, slow):
    body = {"model": "poet", "prompt": "x", "max_tokens": 140, "n": 2}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)
    assert slow.is_idle()
    assert [ticket.cancelled for ticket in slow.tickets] == [True, True]


def test_leaving_while_waiting_in_the_queue(url, engine):
    engine.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={"model": "poet", "prompt": "x"}, timeout=0.3)
    with engine.wake:
        assert engine.wake.wait_for(lambda: engine.tickets[0].cancelled, 10)
    engine.gate.set()
    assert engine.is_idle() and engine.tickets[0].said == 0


def test_a_full_queue_says_when_to_try_again(client, engine):
    engine.slots, engine.queue = 0, 3
    for _ in range(2):
        engine.submit(Request(prompt=(1,), max_new_tokens=1), lambda event: None)
    response = client.post("/v1/completions", json={"model": BASE, "prompt": "x", "n": 2})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    engine.slots = 4
    assert engine.is_idle()
    assert [ticket.cancelled for ticket in engine.tickets] == [False, False, True]  # all or none


def test_what_the_queue_could_never_hold_is_no_matter_of_time(client, engine):
    engine.queue = 3
    for fields in ({"n": 4}, {"prompt": ["x"] * 2, "n": 2}, {"prompt": ["x"] * 4}, {"n": 4, "stream": True}):
        response = client.post("/v1/completions", json={"model": BASE, "prompt": "x", **fields})
        assert response.status_code == 400
        assert "retry-after" not in response.headers
        error = response.json()["error"]
        assert (error["param"], error["message"][:38]) == ("n", "4 answers are asked for (prompts times")
    assert client.post("/v1/completions", json={"model": BASE, "prompt": "x", "n": 3}).status_code == 200


def test_what_nobody_waits_for_is_not_tokenized(url, service, engine, monkeypatch):
    """Three clients leave while the first prompt is tokenized: the others never are, and the first is not answered."""
    begun, go_on, texts = threading.Event(), threading.Event(), []
    read = service.completion_prompts

    def slow(fields):
        texts.append(fields.prompt)
        begun.set()
        assert go_on.wait(30)
        return read(fields)

    monkeypatch.setattr(service, "completion_prompts", slow)
    for text in ("first", "second", "third"):
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "poet", "prompt": text, "stream": text == "second"}
            httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.3))
        assert begun.wait(30)
    left = 'qlora_jax_answers_total{path="/v1/completions",status="499"} 3.0'
    until(lambda: left in httpx.get(f"{url}/metrics").text)
    go_on.set()
    assert httpx.post(f"{url}/v1/completions", json={"model": BASE, "prompt": "last"}, timeout=30).status_code == 200
    assert texts == ["first", "last"]
    assert [(ticket.request.adapter, ticket.cancelled) for ticket in engine.tickets] == [("poet", True), (None, False)]


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_an_engine_that_died_is_no_fault_of_the_request(client, engine):
    engine.state, engine.error = "dead", "out of memory"
    for response in (client.get("/health"), client.post("/v1/completions", json={"model": BASE, "prompt": "x"})):
        assert response.status_code == 503
        assert "out of memory" in response.json()["error"]["message"]


def test_a_signal_lets_running_answers_end_and_takes_no_new_ones(service, slow):
    with running(service) as (server, url), httpx.Client(base_url=url) as client:
        body = {"model": "poet", "prompt": "x", "stream": True, "max_tokens": 100}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            with slow.wake:
                assert slow.wake.wait_for(lambda: slow.draining, 10)
            refused = httpx.post(f"{url}/v1/completions", json={"model": BASE, "prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert httpx.get(f"{url}/health").json() == {"status": "draining"}
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert slow.tickets[0].said == 100
        ended(server)


def test_answers_that_take_too_long_are_ended(service, slow):
    with running(service, drain=0.05) as (server, url), httpx.Client(base_url=url) as client:
        body = {"model": "poet", "prompt": "x", "stream": True, "max_tokens": 140}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        ended(server)


def ended(server):
    """Waits until the server has decided to go."""
    for _ in range(1000):
        if server.should_exit:
            return
        time.sleep(0.01)
    raise AssertionError("the server goes on")


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose"):
            listen("127.0.0.1", port)


def test_addresses():
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("localhost", None), ("0.0.0.0", "127.0.0.1")):
        with listen(host, 0) as bound:
            port = bound.getsockname()[1]
            assert port > 0
            assert shown is None or url_of(bound) == f"http://{shown}:{port}"
    with pytest.raises(ValueError, match="--host 'no such host' is no address"):
        listen("no such host", 0)
    with pytest.raises(ValueError, match="cannot listen on 192.0.2.1"):
        listen("192.0.2.1", 0)
