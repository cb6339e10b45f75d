"""The console's own server, and the ways in which others have one: beside a run, or on its own.

Invariants: the socket is bound before anything is announced; it ends with the context, whoever still watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from shoal.errors import NetworkError
from shoal.serving.connection import HEAD_TIMEOUT_S, MAX_HEAD_BYTES, bounded
from shoal.serving.console.app import Console, make_app
from shoal.serving.console.door import Door
from shoal.serving.console.house import House

MAX_CONNECTIONS = 256
END_S = 3.0
"""Open pages have events under way all the time: they are cut off, and come back when there is a server again."""


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to whoever owns the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket; raises `NetworkError` where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise NetworkError(f"{host}:{port} cannot be used: {error.strerror}.", f"Choose another {option}.") from None


@asynccontextmanager
async def hosted(house: House, door: Door, listening: socket.socket) -> AsyncIterator[str]:
    """Serve while inside; gives the address of the pages."""
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        make_app(Console(house, door)),
        http=bounded(MAX_CONNECTIONS),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = _Server(config)
    async with house.looking():
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://[{host}]:{port}/console" if ":" in host else f"http://{host}:{port}/console"
        finally:
            house.live.close()
            server.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(serving, END_S)
            listening.close()
