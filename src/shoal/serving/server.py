"""The HTTP server's process life: listens, says where, and ends gracefully.

Invariants: the socket is bound before anything is announced; at SIGTERM or Ctrl-C no new connection is taken and
running requests have `drain_s` to end; a second signal ends at once; the engine is closed whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from shoal.config import Serving
from shoal.errors import NetworkError
from shoal.serving.api import Api
from shoal.serving.app import make_app
from shoal.serving.connection import HEAD_TIMEOUT_S, MAX_HEAD_BYTES, bounded
from shoal.serving.console.app import Console
from shoal.serving.keys import Keys
from shoal.serving.sessions import House

BACKLOG = 256


class _Server(uvicorn.Server):
    """uvicorn's server, except that signals only ask it to end: the exit code is the command's.

    Args:
        ends: called at the first signal, to end streams that would go on for ever.
    """

    def __init__(self, config: uvicorn.Config, ends: Callable[[], None] = lambda: None) -> None:
        super().__init__(config)
        self._ends = ends

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_end)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _asked_to_end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._ends()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `NetworkError` where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise NetworkError(f"'{host}' is no address to listen on: {error.strerror}.") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise NetworkError(f"{host}:{port} cannot be used: {error.strerror}.", "Choose another --port.") from None
    return made


async def serve(
    api: Api, keys: Keys, settings: Serving, announce: Callable[[int], None], console: Console | None = None
) -> None:
    """Serve until told to end, the console beside; `announce` is called with the port once it listens."""
    listening = listen(settings.host, settings.port)
    house = House(keys, settings, Path(settings.capture)) if settings.capture else None
    app = make_app(api, keys, house, console.routes() if console is not None else ())
    server = _Server(configured(app, settings), console.house.live.close if console is not None else lambda: None)
    looking = console.house.looking() if console is not None else contextlib.nullcontext()
    announce(listening.getsockname()[1])
    try:
        async with looking:
            await server.serve(sockets=[listening])
    finally:
        listening.close()
        await api.engine.close()


def configured(app: ASGIApp, settings: Serving) -> uvicorn.Config:
    """How an application of ours is served."""
    return uvicorn.Config(
        app,
        http=bounded(settings.max_connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
        timeout_graceful_shutdown=int(settings.drain_s),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
