"""A relay before a TLS server that keeps what it decrypts: exactly what whoever runs that server could read.

    client ══TLS══▶ tap ══TLS══▶ server          FOLDER/000000.up, .down: the plain bytes of connection 0, both ways

It holds the server's own certificate and key, so clients notice nothing. It shows what encryption that ends at a
middleman protects from the middleman: nothing. What was sealed before is there as well, sealed.

Invariants: bytes are written down before they are passed on; more than `max_bytes` are neither kept nor passed on (a
search of half of what went by would prove nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

READ_BYTES = 2**18
CONNECT_WAIT_S = 5.0

MAX_BYTES = 4 * 2**30
"""Of all connections together; a run in a lab moves far less."""

UP, DOWN = ".up", ".down"
"""Endings of the files: from the client to the server, and back."""


class Tap:
    """A running tap, inside `async with`.

    Args:
        listen: address and port for clients.
        server: address and port of the real one.
        towards_clients: shows the server's certificate.
        towards_server: believes it.
        folder: where the decrypted bytes go.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        server: tuple[str, int],
        towards_clients: ssl.SSLContext,
        towards_server: ssl.SSLContext,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._listen = listen
        self._server = server
        self._towards_clients = towards_clients
        self._towards_server = towards_server
        self._folder = folder
        self._left_bytes = max_bytes
        self._number = itertools.count()
        self._relays: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self.overflowed = False
        """Whether there was more than may be kept; then what is kept is not all."""

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._listener = await asyncio.start_server(
            self._relay, *self._listen, ssl=self._towards_clients, limit=READ_BYTES
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        for relay in list(self._relays):
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    async def _relay(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        self._relays.add(relay)
        name = self._folder / f"{next(self._number):06d}"
        server: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_WAIT_S):
                server_reader, server = await asyncio.open_connection(
                    *self._server, ssl=self._towards_server, limit=READ_BYTES
                )
            with name.with_suffix(UP).open("wb") as up, name.with_suffix(DOWN).open("wb") as down:
                ways = [
                    asyncio.create_task(self._pass_on(client_reader, server, up)),
                    asyncio.create_task(self._pass_on(server_reader, client, down)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, TimeoutError):
            pass  # the server is not there: the client sees its connection end, as it would without a tap
        finally:
            self._relays.discard(relay)
            for end in (client, server):
                if end is not None:
                    end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, file: BinaryIO) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(READ_BYTES):
                self._left_bytes -= len(data)
                if self._left_bytes < 0:
                    self.overflowed = True
                    return
                file.write(data)
                file.flush()
                writer.write(data)
                await writer.drain()
