"""Listening, and stopping in good order."""

import logging
import socket
import threading
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qlora_jax.serve.http.connections import Connection, Connections
from qlora_jax.serve.http.service import Service

logger = logging.getLogger(__name__)

GRACE = 5  # seconds that answers have to reach slow clients once the engine is done


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one.

    Raises:
      ValueError: the address is none of this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise ValueError(f"--host {host!r} is no address: {error}") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port (0 takes a free one)"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """How a browser on this machine reaches it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


class Server(uvicorn.Server):
    """Ends at the first SIGTERM or SIGINT when the running requests are done, at the second at once.

    Meanwhile new requests get 503 and /health says "draining".

    Args:
      app: what is served.
      service: its engine is drained.
      drain: seconds that running requests may take.
    """

    def __init__(self, app: FastAPI, service: Service, *, drain: float):
        config = uvicorn.Config(
            app,
            http=type("Connection", (Connection,), {"known": Connections.within_files()}),
            proxy_headers=False,  # nothing here depends on a client's address or on the scheme
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._service, self._drain = service, drain

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Starts to listen, and says where."""
        await super().startup(list(sockets) if sockets else None)
        for bound in sockets or ():
            logger.info(f"serving {self._service.base} on {url_of(bound)}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler. The work happens beside it: the server goes on answering."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        threading.Thread(target=self._finish, name="drain", daemon=True).start()

    def _finish(self) -> None:
        logger.info(f"shutting down: running requests have {self._drain:g} seconds, a second signal ends them now")
        try:
            if not self._service.engine.drain(self._drain):
                self._service.cancel_all()
                self._service.engine.drain(GRACE)
        finally:
            self.should_exit = True
