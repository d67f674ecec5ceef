"""What is served, whether all is well, and changing which adapters there are."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from qlora_jax.serve.http import bodies
from qlora_jax.serve.http.errors import from_engine, unknown_model
from qlora_jax.serve.http.fields import LoadAdapterFields, UnloadAdapterFields
from qlora_jax.serve.http.generation import ERRORS
from qlora_jax.serve.http.metrics import CONTENT_TYPE
from qlora_jax.serve.http.service import Service
from qlora_jax.serve.request import Refused


def routes(service: Service) -> APIRouter:
    """/health, /metrics, /status and /v1/models."""
    router = APIRouter(responses=ERRORS)
    started = int(time.time())

    def model(name: str, parent: str | None) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "qlora-jax", "parent": parent}

    @router.get("/health", response_model=bodies.Health)
    def health() -> dict[str, str]:
        """Whether requests are taken; needs no key."""
        service.check_alive()
        return {"status": "draining" if service.draining else "ok"}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @router.get("/status", response_model=bodies.Status)
    def status() -> dict[str, Any]:
        """Slots, waiting requests and adapters as they are now."""
        engine = dataclasses.asdict(service.engine.view())
        return {"base": service.base, "draining": service.draining, "engine": engine}

    @router.get("/v1/models", response_model=bodies.Models)
    def models() -> dict[str, Any]:
        """The base and every adapter, with the base as its parent."""
        return {"object": "list", "data": [model(name, parent) for name, parent in service.engine.models()]}

    @router.get("/v1/models/{name:path}", response_model=bodies.Model)
    def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        parents = dict(service.engine.models())
        if name not in parents:
            raise unknown_model(name, list(parents))
        return model(name, parents[name])

    return router


def admin_routes(service: Service) -> APIRouter:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; the guard asks for the admin key."""
    router = APIRouter(prefix="/v1", responses=ERRORS)

    async def change(work: Callable[[], Any], name: str, status: str) -> Response:
        try:
            await asyncio.to_thread(work)
        except (Refused, ValueError, OSError) as error:
            known = Refused(str(error)) if isinstance(error, OSError) else error
            raise from_engine(known, param="lora_name") from error
        return JSONResponse({"object": "adapter", "id": name, "status": status})

    @router.post("/load_lora_adapter", response_model=bodies.AdapterChange)
    async def load(fields: LoadAdapterFields) -> Response:
        """Serve a folder inside the adapters folder, or read it again."""
        name = fields.lora_name
        return await change(lambda: service.engine.load_adapter(name, fields.lora_path), name, "loaded")

    @router.post("/unload_lora_adapter", response_model=bodies.AdapterChange)
    async def unload(fields: UnloadAdapterFields) -> Response:
        """Serve it no longer; requests that are running with it go on."""
        return await change(lambda: service.engine.unload_adapter(fields.lora_name), fields.lora_name, "unloaded")

    return router
