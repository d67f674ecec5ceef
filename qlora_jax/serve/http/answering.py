"""Sending what an exchange gives: as one JSON object, or as server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qlora_jax.serve.http.choice import Piece
from qlora_jax.serve.http.errors import ApiError
from qlora_jax.serve.http.exchange import Exchange
from qlora_jax.serve.http.metrics import Metrics
from qlora_jax.serve.http.running import ClientGone, unless_gone
from qlora_jax.serve.http.shapes import Shape

CLIENT_CLOSED = 499  # nobody reads it; logs and metrics do
# An event is a line, and some clients end lines at these too.
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}


async def answer(http: HttpRequest, work: Awaitable[Exchange], shape: Shape, metrics: Metrics) -> Response:
    """The response; a client that leaves cancels what it asked for, and also `work` that has not begun.

    A stream begins with its first token: what is refused before that has a status of its own.
    """
    timed = _Timed(metrics)
    try:
        exchange = await unless_gone(http, work)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)
    streams = False
    try:
        if exchange.fields.stream:
            await unless_gone(http, exchange.begun())
            streams = True
            return EventStream(exchange, _events(exchange, shape, timed))
        return JSONResponse(await unless_gone(http, _whole(exchange, shape, timed)))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        if not streams:
            exchange.run.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; however the stream ends, its slots are given back."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]):
        # nginx gathers what it passes on unless it is told not to.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.run.cancel()


class _Timed:
    """The pieces of an exchange, with the clock running since the request came."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._start = metrics, time.perf_counter()

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    async def pieces(self, exchange: Exchange) -> AsyncIterator[tuple[int, Piece]]:
        waiting = True
        async for index, piece in exchange.pieces():
            if waiting and exchange.choices[index].generated:
                self._metrics.first_token.observe(self._seconds())
                waiting = False
            yield index, piece
        self._metrics.count(exchange.usage(), self._seconds())


async def _whole(exchange: Exchange, shape: Shape, timed: _Timed) -> dict[str, Any]:
    collected: list[list[Piece]] = [[] for _ in exchange.choices]
    async for index, piece in timed.pieces(exchange):
        collected[index].append(piece)
    return shape.whole(exchange, collected)


async def _events(exchange: Exchange, shape: Shape, timed: _Timed) -> AsyncIterator[str]:
    """Each choice opens, goes on and is closed once; then the counts, where wanted, and OpenAI's last line."""
    extra = {"usage": None} if exchange.fields.counts_usage else {}
    for index in range(len(exchange.choices)):
        if opening := shape.opening(index):
            yield _event(opening | extra)
    try:
        async for index, piece in timed.pieces(exchange):
            if piece:
                yield _event(shape.chunk(index, piece, None) | extra)
    except ApiError as error:
        yield _event(error.body())
        return
    for index, choice in enumerate(exchange.choices):
        yield _event(shape.chunk(index, Piece(), choice.reason) | extra)
    if exchange.fields.counts_usage:
        yield _event(shape.counts(exchange.usage()))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False).translate(LINE_ENDS)}\n\n"
