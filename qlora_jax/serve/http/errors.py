"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qlora_jax.serve.http.limits import PROMPTS, STOP_CHARACTERS, STOPS
from qlora_jax.serve.request import Draining, QueueFull, Refused, TooLong, UnknownModel

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
UNIONS = {
    "prompt": f"expected a text, texts, a list of token ids or a list of such lists; at most {PROMPTS} prompts",
    "stop": f"expected a text or a list of at most {STOPS} texts, of 1 to {STOP_CHARACTERS} characters each",
    "content": 'expected a text or a list of {"type": "text", "text": ...}',
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: HTTP's.
      message: what is wrong, what was expected, what to do.
      param: the field of the request that is at fault.
      code: a word for programs, such as "model_not_found".
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(str(self)), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=dict(self.headers or {}))


def _encodable(text: str) -> str:
    """What a client sent may hold half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def unknown_model(name: str, served: Sequence[str], reason: str | None = None) -> ApiError:
    """404, with the first names that are served, and why something of this name is not."""
    shown = ", ".join(served[:20]) + (f" and {len(served) - 20} more" if len(served) > 20 else "")
    why = "" if reason is None else f" ({reason})"
    message = f"no model {name!r:.80} is served{why}; served are {shown}"
    return ApiError(404, message, param="model", code="model_not_found")


def from_engine(error: Exception, *, param: str) -> ApiError:
    """The answer to what the engine refused; `param` is the field that was at fault, if it was a field."""
    match error:
        case UnknownModel():
            return ApiError(404, str(error), param=param, code="model_not_found")
        case TooLong():
            return ApiError(400, str(error), param=param, code="context_length_exceeded")
        case QueueFull():
            wait = {"Retry-After": str(max(1, round(error.retry_after)))}
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=wait)
        case Draining():
            return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
        case Refused() | ValueError():
            return ApiError(400, str(error), param=param)
    raise error


def from_validation(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """The first error that the schema found, the field named; `known` are the fields that there are."""
    # A misspelt name is also a missing one: the unknown field comes first.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    param = _param(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        return ApiError(400, f"unknown field {name!r:.80}{hint}", param=name[:80], code="unknown_parameter")
    if param is None:
        about_keys = first["type"].startswith("string")
        return ApiError(400, f"a field's name: {first['msg']}" if about_keys else "the body must be a JSON object")
    reason = first["msg"].removeprefix("Value error, ")
    # A union's errors are one for each of its members, of which most were not meant.
    union = next((name for name in reversed(param.split(".")) if name in UNIONS), None)
    return ApiError(400, f"{param}: {UNIONS[union] if union else reason}", param=param)


def _param(place: Sequence[str | int]) -> str | None:
    """The field: ("body", "messages", 0, "content", "list[Part]", 1) is in "messages.0.content"."""
    names = [str(part) for part in place[1:]]
    end = next((i + 1 for i, name in enumerate(names) if name in UNIONS), len(names))
    return ".".join(names[:end]) or None


def _respond(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


def _respond_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    field = getattr(request.scope.get("route"), "body_field", None)
    fields = getattr(getattr(field, "field_info", None), "annotation", None)
    return from_validation(error.errors(), sorted(getattr(fields, "model_fields", {}))).response()


def _respond_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: no such path, another method, a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    messages = {
        404: f"nothing is served at {path}",
        405: f"{request.method} is not allowed at {path}",
        400: "the body cannot be parsed as JSON",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


def _respond_defect(request: Request, error: Exception) -> JSONResponse:
    """A defect of ours: its words stay in the log (the framework raises it again)."""
    return ApiError(500, "the server failed to answer; its log says why").response()


def install(app: FastAPI) -> None:
    """Makes every error of the app one of these."""
    app.add_exception_handler(ApiError, _respond)
    app.add_exception_handler(RequestValidationError, _respond_invalid)
    app.add_exception_handler(HTTPException, _respond_http)
    app.add_exception_handler(Exception, _respond_defect)
