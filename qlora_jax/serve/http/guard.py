"""What is checked before a request reaches the app: who asks, from where, and how much."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qlora_jax.io.bounded_json import check_structure
from qlora_jax.serve.http import limits
from qlora_jax.serve.http.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/", "/health"}  # the page holds no data; it asks for the key
ADMIN = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the server.

    Attributes:
      api_key: opens everything but the admin's endpoints; None: they are open.
      admin_key: opens the admin's endpoints; None: there are none.
      hosts: names that the Host header may give; None for any. A page in a browser on this machine can reach a
        server on the loopback address through a name of its own (DNS rebinding), and gives itself away there.
      public: names by which a proxy is called, each perhaps with a port: a Host header may give them, and pages have
        them as their origin, whichever Host the proxy passes on.
    """

    api_key: str | None = None
    admin_key: str | None = None
    hosts: frozenset[str] | None = None
    public: frozenset[str] = frozenset()

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError 401, 403 or 404."""
        self._check_host(headers)
        if path in ADMIN and self.admin_key is None:
            raise ApiError(404, f"{path} is off: start the server with --admin-key")
        key = self.admin_key if path in ADMIN else self.api_key
        if key is not None and path not in OPEN and not _same(_bearer(headers), key):
            which = "admin key" if path in ADMIN else "API key"
            wanted = f"the {which} is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(401, wanted, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        # A proxy that does not pass the Host on may say here by which one it was called.
        called = headers.get("x-forwarded-host", host).split(",")[0].strip() if self.public else host
        for name in (host, called):
            if self.hosts is not None and _hostname(name) not in self.hosts and not self._is_public(name):
                known = ", ".join(sorted(self.hosts | self.public))
                raise ApiError(
                    403, f"Host {name!r:.80} is not this server's: use one of {known}, or serve with --public-host"
                )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host and not self._is_public(_netloc(origin)):
            raise ApiError(
                403,
                f"requests from pages of other origins are refused, this one is from {origin!r:.80}: behind a proxy, "
                "serve with --public-host",
            )

    def _is_public(self, host: str | None) -> bool:
        """A public name without a port stands for any port."""
        return host is not None and (host.lower() in self.public or _hostname(host) in self.public)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, expected: str) -> bool:
    """Takes the same time whatever differs; digests, so that lengths tell nothing either."""
    digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in (given, expected)]
    return hmac.compare_digest(*digests)


class Guard:
    """ASGI middleware: checks access, then reads the body up to its limit before the app sees the request."""

    def __init__(self, app: App, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.access.check(scope["path"], headers)
            body = await self._body(scope, headers, receive)
            _check_body(body)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _body(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was sent."""
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        try:
            async with asyncio.timeout(limits.BODY_SECONDS):
                return await _read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.BODY_SECONDS:.0f} seconds") from None


async def _read(receive: Receive) -> bytes | None:
    """Of a body that is too large, the rest is read too, up to a bound: else many clients would see a broken connection
    instead of the answer."""
    body, length = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        length += len(part)
        if length <= limits.BODY_BYTES:
            body += part
        ended = not message.get("more_body", False)
        if length > limits.BODY_BYTES and (ended or length > limits.DISCARDED_BYTES):
            error = f"the body is larger than {limits.BODY_BYTES} bytes"
            raise ApiError(413, error, code="body_too_large", headers={"Connection": "close"})
        if ended:
            return bytes(body)


def _check_body(body: bytes | None) -> None:
    """Before anything is built of it: validating a list of two million wrong values took half a minute."""
    try:
        check_structure(body or b"", limits.BODY)
    except ValueError as error:
        raise ApiError(400, f"the body cannot be parsed as JSON: {error}") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever comes after it: the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
