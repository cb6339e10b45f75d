"""The application: which path is answered by whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from shoal.serving.api import Api, json_response, unknown
from shoal.serving.chat import chat
from shoal.serving.completions import completions
from shoal.serving.door import Door, api_error, client_gone, defect, http_error
from shoal.serving.embeddings import embeddings
from shoal.serving.errors import ApiError
from shoal.serving.keys import Keys
from shoal.serving.openapi import describe
from shoal.serving.responses import ResponseBody, responses
from shoal.serving.schema import ChatBody, CompletionBody, EmbeddingBody
from shoal.serving.sessions import House, forget_session, open_session, reward_session, session_state
from shoal.serving.sessions_calls import session_chat, session_completions, session_models

Endpoint = Callable[[Api, Request], Awaitable[Response]]

POSTS: dict[str, tuple[Endpoint, type, str]] = {
    "/v1/chat/completions": (chat, ChatBody, "Answer a conversation."),
    "/v1/completions": (completions, CompletionBody, "Complete a text."),
    "/v1/responses": (responses, ResponseBody, "Answer a conversation; nothing is kept."),
    "/v1/embeddings": (embeddings, EmbeddingBody, "Texts as vectors."),
}


async def models(api: Api, _: Request) -> Response:
    return json_response({"object": "list", "data": [_model(api, name) for name in api.models]})


async def model(api: Api, request: Request) -> Response:
    name = request.path_params["model"]
    if name not in api.models:
        raise unknown(name)
    return json_response(_model(api, name))


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


SessionEndpoint = Callable[[Api, House, Request], Awaitable[Response]]

SESSION_CALLS: list[tuple[str, str, SessionEndpoint]] = [
    ("/sessions/{id}/v1/chat/completions", "POST", session_chat),
    ("/sessions/{id}/v1/completions", "POST", session_completions),
    ("/sessions/{id}/v1/models", "GET", session_models),
    ("/sessions/{id}/reward", "POST", reward_session),
]

SESSION_KEEPING: list[tuple[str, str, SessionEndpoint]] = [
    ("/sessions", "POST", open_session),
    ("/sessions/{id}", "GET", session_state),
    ("/sessions/{id}", "DELETE", forget_session),
]


def make_app(api: Api, keys: Keys, sessions: House | None = None, pages: Iterable[BaseRoute] = ()) -> Starlette:
    """The ASGI application of one model; with `sessions`, clients may open such; `pages` ask for keys themselves."""

    def bound(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await endpoint(api, request)

        return answer

    routes = [Route(path, bound(endpoint), methods=["POST"]) for path, (endpoint, _, _) in POSTS.items()]
    routes += [Route(path, bound(endpoint), methods=["GET"]) for path, (endpoint, _) in GETS.items()]
    if sessions is not None:
        routes += _session_routes(api, sessions, [*SESSION_KEEPING, *SESSION_CALLS])
    return _application(api, keys, [*routes, *pages])


def make_sessions_app(api: Api, sessions: House) -> Starlette:
    """An application that answers the sessions which are open, and nothing else."""
    return _application(api, Keys({}), _session_routes(api, sessions, SESSION_CALLS))


def _session_routes(api: Api, sessions: House, endpoints: Iterable[tuple[str, str, SessionEndpoint]]) -> list[Route]:
    def bound(endpoint: SessionEndpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await endpoint(api, sessions, request)

        return answer

    return [Route(path, bound(endpoint), methods=[method]) for path, method, endpoint in endpoints]


def _application(api: Api, keys: Keys, routes: Sequence[BaseRoute]) -> Starlette:
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


def _model(api: Api, name: str) -> dict[str, object]:
    found: dict[str, object] = {"id": name, "object": "model", "created": api.created, "owned_by": "shoal"}
    return found | ({"parent": api.model} if name.startswith(f"{api.model}:") else {})
