"""Who keeps a connection open and asks nothing does not keep the others out."""

import socket

import httpx
import pytest

from qlora_jax.serve.http import limits
from qlora_jax.serve.http.connections import Connections
from tests.serve.http.live import running

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-a: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def connect():
    """`connect(url, sent)`: a connection on which something was sent."""
    opened = []

    def open_one(url, sent):
        host, port = url.removeprefix("http://").split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=30))
        opened[-1].sendall(sent)
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def is_closed(connection):
    """Whether the server closes it, at once or within the socket's patience."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    return True


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)


@pytest.mark.parametrize("sent", [b"", HALF, b"GET"], ids=["nothing", "half", "a word"])
def test_a_head_that_does_not_come_is_not_waited_for(service, connect, hasty, sent):
    with running(service) as (_, url):
        assert is_closed(connect(url, sent))
        assert httpx.get(f"{url}/health").status_code == 200


def test_nor_is_a_second_one(service, connect, hasty):
    with running(service) as (_, url):
        connection = connect(url, WHOLE)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.sendall(HALF)
        assert is_closed(connection)


def test_bytes_one_by_one_do_not_help(service, connect, hasty):
    with running(service) as (_, url):
        connection = connect(url, HALF)
        connection.settimeout(0.05)
        with pytest.raises(OSError):  # noqa: PT011 (reset or broken, whichever comes first)
            for _ in range(600):
                connection.sendall(b"a")
                try:
                    if connection.recv(1) == b"":
                        raise ConnectionResetError
                except TimeoutError:
                    pass


def test_an_answer_may_take_longer_than_a_head(client, engine, hasty):
    engine.pace = 0.05
    body = {"model": "poet", "prompt": "x", "max_tokens": 140, "stream": True}
    engine.scripts["poet"] = list(engine.scripts["poet"]) * 3
    assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(Connections, "within_files", classmethod(lambda cls: cls(per_address=4, total=6)))


def test_connections_without_a_request_make_room(service, connect, few):
    with running(service) as (_, url):
        held = [connect(url, HALF) for _ in range(20)]
        assert httpx.get(f"{url}/health").status_code == 200
        assert all(is_closed(connection) for connection in held[:16])


def test_connections_with_requests_are_kept_and_no_more_are_taken(service, engine, connect, few):
    engine.gate.clear()
    with running(service) as (_, url):
        body = b'{"model": "poet", "prompt": "x"}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        sent = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
        held = [connect(url, sent) for _ in range(4)]
        with engine.wake:
            assert engine.wake.wait_for(lambda: len(engine.tickets) == 4, 30)
        answer, refused = b"", connect(url, b"")
        while part := refused.recv(4096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 429 ") and b"too many connections from this address" in answer
        engine.gate.set()
        assert [connection.recv(15) for connection in held] == [b"HTTP/1.1 200 OK"] * 4


def test_there_are_fewer_connections_than_files(monkeypatch):
    for files, expected in ((200, (75, 150)), (1 << 20, (512, 1024)), (-1, (384, 768)), (4, (4, 8))):
        monkeypatch.setattr("resource.getrlimit", lambda which, files=files: (files, files))
        found = Connections.within_files()
        assert (found.per_address, found.total) == expected
