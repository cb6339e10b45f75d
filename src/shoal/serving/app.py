"""The application: which path is answered by whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.serving.api import Api, json_response
from shoal.serving.chat import chat
from shoal.serving.completions import completions
from shoal.serving.door import Door, api_error, client_gone, defect, http_error
from shoal.serving.errors import ApiError
from shoal.serving.keys import Keys
from shoal.serving.openapi import describe
from shoal.serving.responses import ResponseBody, responses
from shoal.serving.schema import ChatBody, CompletionBody

Endpoint = Callable[[Api, Request], Awaitable[Response]]

POSTS: dict[str, tuple[Endpoint, type, str]] = {
    "/v1/chat/completions": (chat, ChatBody, "Answer a conversation."),
    "/v1/completions": (completions, CompletionBody, "Complete a text."),
    "/v1/responses": (responses, ResponseBody, "Answer a conversation; nothing is kept."),
}


async def models(api: Api, _: Request) -> Response:
    return json_response({"object": "list", "data": [_model(api)]})


async def model(api: Api, request: Request) -> Response:
    api.check_model(request.path_params["model"])
    return json_response(_model(api))


async def health(api: Api, _: Request) -> Response:
    """200 as long as the engine answers."""
    if not api.engine.is_alive:
        raise ApiError(503, "The engine has stopped.", code="engine_stopped")
    if api.engine.trouble:
        raise ApiError(503, api.engine.trouble, code="no_stages")
    return json_response({"status": "ok"})


async def metrics(api: Api, _: Request) -> Response:
    return Response(api.metrics.page(), media_type=CONTENT_TYPE_LATEST)


async def openapi(_: Api, request: Request) -> Response:
    posts = {path: (kind, summary) for path, (_, kind, summary) in POSTS.items()}
    gets = {path: summary for path, (_, summary) in GETS.items()}
    return json_response(describe(posts, gets, keyed=request.app.state.keyed))


GETS: dict[str, tuple[Endpoint, str]] = {
    "/v1/models": (models, "The models served here."),
    "/v1/models/{model:path}": (model, "One of them."),
    "/health": (health, "Whether the engine lives."),
    "/metrics": (metrics, "Counters for Prometheus."),
    "/openapi.json": (openapi, "This description."),
}


def make_app(api: Api, keys: Keys) -> Starlette:
    """The ASGI application of one model."""

    def bound(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await endpoint(api, request)

        return answer

    routes = [Route(path, bound(endpoint), methods=["POST"]) for path, (endpoint, _, _) in POSTS.items()]
    routes += [Route(path, bound(endpoint), methods=["GET"]) for path, (endpoint, _) in GETS.items()]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Door, keys=keys, metrics=api.metrics, paths={*POSTS, *GETS})],
        exception_handlers={
            ApiError: api_error,
            HTTPException: http_error,
            ClientDisconnect: client_gone,
            Exception: defect,
        },
    )
    app.state.keyed = bool(keys.names)
    return app


def _model(api: Api) -> dict[str, object]:
    return {"id": api.model, "object": "model", "created": api.created, "owned_by": "shoal"}
