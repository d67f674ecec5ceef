"""The two endpoints that generate."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qlora_jax.serve.http import bodies
from qlora_jax.serve.http.answering import answer
from qlora_jax.serve.http.fields import ChatFields, CompletionFields
from qlora_jax.serve.http.service import Service
from qlora_jax.serve.http.shapes import ChatShape, CompletionShape

DEFAULT_TOKENS = 16  # of a completion, as with OpenAI
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": bodies.ErrorBody, "description": "Refused"},
    "5XX": {"model": bodies.ErrorBody, "description": "The server's fault, or it is shutting down"},
}


def _answers(model: type) -> dict[int | str, dict[str, Any]]:
    event = {"type": "object", "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}}}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "content": events, "description": "Whole, or with stream=true in events"}, **ERRORS}


def routes(service: Service) -> APIRouter:
    """POST /v1/completions and /v1/chat/completions."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions", responses=_answers(bodies.Completion))
    async def completions(fields: CompletionFields, http: Request) -> Response:
        """Continue a text, several texts or token ids."""
        exchange = service.exchange(
            fields,
            lambda: service.completion_prompts(fields),
            param="prompt",
            max_new_tokens=DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens,
            top_logprobs=fields.logprobs,
            echo=bool(fields.echo),
            lists_end=True,  # lm-evaluation-harness counts on an entry for every token that it asked for
        )
        shape = CompletionShape(fields.model, service.texts, logprobs=fields.logprobs is not None)
        return await answer(http, exchange, shape, service.metrics)

    @router.post("/chat/completions", responses=_answers(bodies.ChatCompletion))
    async def chat_completions(fields: ChatFields, http: Request) -> Response:
        """Say the assistant's next turn."""
        exchange = service.exchange(
            fields,
            lambda: service.chat_prompts(fields),
            param="messages",
            max_new_tokens=fields.wanted_tokens,
            top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        )
        shape = ChatShape(fields.model, service.texts, logprobs=bool(fields.logprobs))
        return await answer(http, exchange, shape, service.metrics)

    return router
