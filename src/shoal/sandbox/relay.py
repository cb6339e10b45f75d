"""The host's end of a sandbox's network: it accepts on a listener inside and joins each connection to its target.

The listener was opened in the sandbox's own network namespace and handed over, so accepting from it needs no process
inside, and a sandbox can reach nothing but what a listener is joined to: the kernel has no route for it.

Invariants: at most `MAX_CONNECTIONS` at once for each address; at most one buffer in each direction is held for a
slow reader; what was opened during a job is closed behind it.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from shoal.sandbox.job import Relay

MAX_CONNECTIONS = 64
CONNECT_TIMEOUT_S = 10.0
_PIECE_BYTES = 1 << 16


class RelayPort:
    """One relay of one sandbox."""

    def __init__(self, relay: Relay, listener: socket.socket) -> None:
        self.relay = relay
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._listener)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._join(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = self.relay.target
        far: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if isinstance(target, Path):
                    far_reader, far = await asyncio.open_unix_connection(str(target))
                else:
                    far_reader, far = await asyncio.open_connection(*target)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, far))
                both.create_task(_pump(far_reader, writer))
        except* (OSError, TimeoutError):
            pass  # One side is not there, or no longer: the other's connection is reset.
        finally:
            for side in (writer, far):
                if side is not None:
                    side.transport.abort()

    async def drop_connections(self) -> None:
        """Ends every connection; waits until they have ended."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        else:
            self._listener.close()
        await self.drop_connections()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
