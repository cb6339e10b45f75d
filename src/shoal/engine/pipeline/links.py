"""Direct links with steps on them: whole steps in, whole steps out, and a sign of life in between.

Invariants: the frames of two steps are never mixed on one link; a link that says nothing for `SILENCE_S` is ended;
at most `MAX_LINKS` links are open at once, and none of a node that `allow` rejects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shoal.broadcast.link import READ_BUFFER_BYTES, Kind, Link, listener_context, welcome
from shoal.errors import NetworkError, ShoalError
from shoal.fabric.endpoint import is_loopback, reachable_addresses, resolve
from shoal.fabric.identity import Identity
from shoal.protocol.codec import decode
from shoal.protocol.stage import MAX_HEADER_BYTES, LinkAddress, Reassembly, Step, frames

log = logging.getLogger("shoal.pipeline")

ALIVE_S = 0.5
SILENCE_S = 5.0
"""Ten signs of life in a row were lost, or whoever gives them is stopped."""

HANDSHAKES, HANDSHAKE_S = 3, 3.0
"""To measure a delay with, and the longest that one may take."""

MAX_LINKS = 256


class StepLink:
    """A link for steps; `run` reads it and keeps it alive."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sending = asyncio.Lock()
        self.peer = link.peer
        """Public key of the other end."""

    async def send(self, header: bytes, tensor: bytes) -> None:
        """Send a step.

        Raises:
            NetworkError: the link has ended.
        """
        async with self._sending:
            for frame in frames(header, tensor):
                await self._link.send(Kind.PIECE, frame)

    async def run(self, take: Callable[[Step, bytes], Awaitable[None]]) -> None:
        """Hand every step to `take` until the link ends.

        Raises:
            NetworkError: it has ended.
            RecordError: what comes is no step.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(take))
                group.create_task(self._keep())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._link.close()

    async def _read(self, take: Callable[[Step, bytes], Awaitable[None]]) -> None:
        parts = Reassembly()
        while True:
            kind, frame = await self._link.receive()
            if kind == Kind.ALIVE:
                continue
            if kind != Kind.PIECE:
                raise NetworkError(f"a peer sent a frame of kind {kind.name}.")
            if (whole := parts.add(frame)) is not None:
                await take(decode(whole[0], Step, max_bytes=MAX_HEADER_BYTES), whole[1])

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(ALIVE_S)
            if loop.time() - self._link.heard_at > SILENCE_S:
                raise NetworkError(f"a link was silent for {SILENCE_S:g} s.")
            if not self._sending.locked():  # else what is being sent is the sign
                async with self._sending:
                    await self._link.send(Kind.ALIVE)

    def close(self) -> None:
        self._link.close()


async def link_delay(address: LinkAddress) -> float:
    """Seconds one way to where links are taken: half of the quickest of some TCP handshakes; -1 where there is none."""
    loop, best = asyncio.get_running_loop(), float("inf")
    for _ in range(HANDSHAKES):
        started = loop.time()
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                _, writer = await asyncio.open_connection(address.host, address.port)
        except (OSError, TimeoutError):
            return -1.0
        best = min(best, loop.time() - started)
        writer.transport.abort()
    return best / 2


class LinkPort:
    """Takes links and runs `handler` for each until closed.

    Args:
        allow: takes a dialler's public key.
    """

    def __init__(
        self,
        identity: Identity,
        handler: Callable[[StepLink], Awaitable[None]],
        allow: Callable[[bytes], bool],
    ) -> None:
        self._identity = identity
        self._handler = handler
        self._allow = allow
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> LinkAddress:
        """Listen on any free port; gives where others reach it.

        Raises:
            NetworkError: the address is not this machine's.
        """
        bound = await asyncio.to_thread(resolve, host)
        context = None if is_loopback(bound) else await asyncio.to_thread(listener_context, self._identity)
        try:
            self._server = await asyncio.start_server(self._serve, bound, 0, ssl=context, limit=READ_BUFFER_BYTES)
        except OSError as error:
            raise NetworkError(f"cannot listen for links on {host}: {error.strerror or error}.") from error
        port = self._server.sockets[0].getsockname()[1]
        return LinkAddress(host=reachable_addresses(bound)[0], port=port, public_key=self._identity.public_key)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= MAX_LINKS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            await self._handler(StepLink(await welcome(self._identity, reader, writer, self._allow)))
        except ShoalError as error:
            log.info("a link ended: %s", error.problem)
        except asyncio.CancelledError:
            pass  # `close` ends links so, and the stream's own callback would report it as a failure
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
