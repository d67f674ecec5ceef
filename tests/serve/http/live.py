"""A server on a loopback port, in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from qlora_jax.serve.http.app import make_app
from qlora_jax.serve.http.guard import LOOPBACK, Access
from qlora_jax.serve.http.server import Server, listen, url_of
from qlora_jax.serve.http.service import Service


@contextlib.contextmanager
def serving(service: Service, **options: Any) -> Iterator[str]:
    """Its address; the server ends with the block. `options` are those of `running`."""
    with running(service, **options) as (_, url):
        yield url


@contextlib.contextmanager
def running(
    service: Service, *, drain: float = 5.0, public: Iterable[str] = (), **keys: str | None
) -> Iterator[tuple[Server, str]]:
    """The server and its address."""
    app = make_app(service, Access(hosts=frozenset(LOOPBACK), public=frozenset(public), **keys))
    server, bound = Server(app, service, drain=drain), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server, url_of(bound)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
