"""The web application: its routes, and what surrounds each of them."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstore_engine.server.chat import chat, chat_tokens
from kvstore_engine.server.completion import complete
from kvstore_engine.server.errors import bad_request, install_error_handlers
from kvstore_engine.server.metrics import Metrics
from kvstore_engine.server.protocol import TokenizeBody
from kvstore_engine.server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Endpoint = Callable[[Service, Request], Awaitable[Response]]


async def health(service: Service, _request: Request) -> Response:
    """200 once the model is loaded and the engine process lives, else 503."""
    state = service.engine.state
    if state == "ready":
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": state, "reason": service.engine.death or None}, 503)


async def models(service: Service, _request: Request) -> Response:
    """The one model, as OpenAI lists models."""
    ready = service.ready()
    model = {
        "id": ready.model,
        "object": "model",
        "created": service.created,
        "owned_by": "kvstore",
        "max_model_len": ready.max_context,
    }
    return JSONResponse({"object": "list", "data": [model]})


async def metrics(service: Service, _request: Request) -> Response:
    """Prometheus text."""
    return Response(service.metrics.render(), headers={"content-type": METRICS_TYPE})


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text, or of a conversation through the chat template."""
    body = await service.read_body(request, TokenizeBody)
    ready = service.ready(body.model)
    if body.messages is not None and body.prompt is None:
        tokens = await chat_tokens(
            service, body.messages, add_generation_prompt=body.add_generation_prompt
        )
    elif body.prompt is not None and body.messages is None:
        tokens = await service.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    else:
        raise bad_request("give either prompt or messages")
    return JSONResponse(
        {"tokens": tokens, "count": len(tokens), "max_model_len": ready.max_context}
    )


async def reset_prefix_cache(service: Service, _request: Request) -> Response:
    """Forgets the prefix cache in the engine's own pages; the store keeps its blocks."""
    service.ready()
    service.engine.reset_cache()
    return JSONResponse({"status": "ok"})


ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/completions", complete),
    ("POST", "/v1/chat/completions", chat),
    ("GET", "/v1/models", models),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("POST", "/tokenize", tokenize),
    ("POST", "/reset_prefix_cache", reset_prefix_cache),
)


class CountResponses:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._known = frozenset(path for _, path, _ in ROUTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._known else "other"
        status = 500  # if the endpoint raises before it answers

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            self._metrics.responded(route, status)


def create_app(service: Service) -> FastAPI:
    """The application that serves ``service``."""
    app = FastAPI(title="kvstore-engine", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    for method, path, endpoint in ROUTES:
        app.add_api_route(path, _bound(service, endpoint), methods=[method], response_model=None)
    app.add_middleware(CountResponses, metrics=service.metrics)
    return app


def _bound(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await endpoint(service, request)

    return handle
