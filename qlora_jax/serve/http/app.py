"""The application: endpoints, errors and the guard before them."""

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax.serve.http import errors, generation, management, page
from qlora_jax.serve.http.guard import Access, Guard
from qlora_jax.serve.http.metrics import Metrics
from qlora_jax.serve.http.service import Service


def make_app(service: Service, access: Access) -> FastAPI:
    """An ASGI application; /openapi.json describes it.

    Args:
      service: the engine and its tokenizer.
      access: keys, and under which names the server may be called.
    """
    # Their pages would load scripts from elsewhere.
    # A redirect would name the address behind a proxy instead of the proxy's.
    app = FastAPI(title="qlora-jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.include_router(page.routes())
    app.include_router(management.routes(service))
    app.include_router(generation.routes(service))
    if access.admin_key is not None:
        app.include_router(management.admin_routes(service))
    # The last one added sees a request first.
    app.add_middleware(Guard, access=access)
    app.add_middleware(_Counted, metrics=service.metrics)
    return app


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths that nobody serves are the client's choice, and no label.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.answers.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
