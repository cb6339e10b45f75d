"""Serving an ASGI application from a command until Ctrl-C, with the bounds that `shoal serve` has."""

from __future__ import annotations

import socket
from typing import Any

MAX_CONNECTIONS = 256


async def host(app: Any, listening: socket.socket, *, lifespan: bool = False, drain_s: int = 5) -> None:
    """Serve until a signal says to end; requests then have `drain_s` to end."""
    import uvicorn

    from shoal.serving.connection import HEAD_TIMEOUT_S, MAX_HEAD_BYTES, bounded

    config = uvicorn.Config(
        app,
        http=bounded(MAX_CONNECTIONS),
        ws="none",
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
        timeout_graceful_shutdown=drain_s,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    try:
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        listening.close()
