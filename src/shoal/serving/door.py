"""The way in: asks for the key, counts what was answered, and gives every error OpenAI's shape.

Invariants: without a valid key nobody learns anything but that one is needed, and no body is read; where none is asked
for, neither is a body of what another site's page sends (`origin`); every answer has an `x-request-id`; what fails
inside is logged there and says nothing outside.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.serving.errors import ApiError
from shoal.serving.keys import Keys
from shoal.serving.metrics import Metrics
from shoal.serving.origin import check_page

logger = logging.getLogger("shoal.serving")

OPEN_PATHS = ("/health",)
"""Answered without a key."""

CONSOLE = "/console"
"""Below this, the console decides who is let in."""

SESSIONS = "/sessions/"
"""Below this, sessions ask for keys themselves."""


class Door:
    """ASGI middleware around the whole application.

    Args:
        paths: the routes, which become labels; any other path is counted as `other`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, paths: Container[str]) -> None:
        self._app, self._keys, self._metrics, self._paths = app, keys, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", secrets.token_hex(12).encode())]
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, receive, counted)
        except ApiError as error:
            if status:
                raise
            await error.response()(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status or 499)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _check_key(self, scope: Scope) -> None:
        path: str = scope["path"]
        if path in OPEN_PATHS or path.startswith(CONSOLE):
            return
        if not self._keys.names:
            check_page(Headers(scope=scope))
            return
        if path.startswith(SESSIONS):
            return
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = header.decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or self._keys.owner(key.strip()) is None:
            raise ApiError(401, "A valid API key is needed, as Authorization: Bearer.", code="invalid_api_key")


async def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(_: Request, error: Exception) -> Response:
    """No such path or method."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{error.detail}.").response()
    response.headers.update(error.headers or {})
    return response


async def client_gone(_: Request, error: Exception) -> Response:
    """Nobody reads this; it ends the request."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


async def defect(_: Request, error: Exception) -> Response:
    """Ours to mend. Starlette raises it again afterwards, so that the server logs it whole."""
    logger.error("a request failed: %r", error)
    return ApiError(500, "The server failed.", code="internal_error").response()
