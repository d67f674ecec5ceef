"""Requests on the engine's thread, their events in the server's loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

from fastapi import Request as HttpRequest

from qlora_jax.serve.request import Event, Finished, Listener, Request

T = TypeVar("T")


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None: ...


class Submits(Protocol):
    """The part of the engine that this file needs."""

    def submit(self, request: Request, listener: Listener) -> Ticket: ...


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Run:
    """Several requests that are answered together: all are submitted, or none.

    Args:
      requests: in the order of the choices.
      loop: where the events are waited for; this may be called on any thread.

    Raises:
      Refused, ValueError: what the engine does not take.
    """

    def __init__(self, engine: Submits, requests: Sequence[Request], loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._first: tuple[int, Event] | None = None
        self._tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, self._listener(index)))
        except Exception:
            self.cancel()
            raise

    def _listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen

    async def first(self) -> Event:
        """The first event of all, as soon as it is there; `events` gives it again."""
        if self._first is None:
            self._first = await self._events.get()
        return self._first[1]

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Every event with the index of its request, until all have finished."""
        left = len(self._tickets)
        while left:
            index, event = self._first or await self._events.get()
            self._first = None
            left -= isinstance(event, Finished)
            yield index, event

    def stop(self, index: int) -> None:
        """No more tokens are wanted for this one; its Finished still comes."""
        self._tickets[index].cancel()

    def cancel(self) -> None:
        """Stops all; those that have finished do not mind."""
        for ticket in self._tickets:
            ticket.cancel()


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """What `work` gives; ClientGone, and `work` is cancelled, if the client leaves before that."""
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise ClientGone
    finally:
        gone.cancel()
        job.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
