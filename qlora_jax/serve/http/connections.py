"""Connections: how long a request's head may take, and how many there may be, so that nobody keeps the others out."""

import asyncio
import resource
import socket
import struct

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_jax.serve.http import limits
from qlora_jax.serve.http.errors import ApiError

NO_LINGER = struct.pack("ii", 1, 0)  # on, for no time


class Connections:
    """The open connections, the oldest first.

    Args:
      per_address: how many a single address may have.
      total: how many there may be in all.
    """

    def __init__(self, *, per_address: int, total: int):
        self.per_address, self.total = per_address, total
        self._open: dict[Connection, str] = {}

    @classmethod
    def within_files(cls) -> "Connections":
        """As many as the process may open files: three quarters of them, and half of these for one address."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        total = max(8, min(limits.CONNECTIONS, (files if files > 0 else limits.CONNECTIONS) * 3 // 4))
        return cls(per_address=total // 2, total=total)

    def admit(self, new: "Connection", address: str) -> bool:
        """Takes a new one, in place of the oldest that has no request under way where there are too many already."""
        own = [connection for connection, other in self._open.items() if other == address]
        if len(own) >= self.per_address:
            room = self._drop_idle(own)
        else:
            room = len(self._open) < self.total or self._drop_idle(list(self._open))
        if room:
            self._open[new] = address
        return room

    def forget(self, connection: "Connection") -> None:
        """It is closed."""
        self._open.pop(connection, None)

    def _drop_idle(self, candidates: "list[Connection]") -> bool:
        oldest = next((connection for connection in candidates if connection.idle), None)
        if oldest is None:
            return False
        oldest.drop()
        return True


class Connection(H11Protocol):
    """uvicorn's, closed where a request's head is not there in time.

    Attributes:
      known: those of this server.
    """

    known: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        if self.known.admit(self, self.client[0] if self.client else ""):
            self._watch()
        else:
            self._refuse()

    def data_received(self, data: bytes) -> None:
        """Waits for the next head from its first byte on."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._stop_watching()
        self.known.forget(self)
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: none has come yet, or its head is not complete."""
        return self.conn.their_state is h11.IDLE or self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        """Closes it without a word, and in such a way that nothing of it is kept and the other side knows at once."""
        self.known.forget(self)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(limits.HEAD_SECONDS, self._close_late)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._late = None
        if self.idle:
            self.drop()

    def _refuse(self) -> None:
        body = bytes(ApiError(429, "too many connections from this address: close some of them").response().body)
        head = f"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()
