"""The browser's only way to a network: a proxy on loopback, one for each isolated page.

Every request of a page comes here, whatever its host. Hosts of our own (`sites`) are answered in this process, under
addresses that are the same in every run (`http://shop.test/`); an allowed host of the outside is connected to; anything
else is refused with 403 and counted.

Invariants: a name is looked up here and connected to by the address that was checked; a name that leads to this machine
or to a private network is refused unless the list names it with its port; every wait has a deadline and
every body a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from shoal.errors import NetworkError, RecordError, ShoalError

MAX_BODY_BYTES = 1 << 20
"""Of a request to a site of ours."""
READ_BYTES = 65536
IDLE_S = 60.0
"""A connection on which nothing happens for this long is closed."""
CONNECT_S = 10.0
CLOSE_S = 5.0
MAX_CONNECTIONS = 256

PAGE_HEADERS = (("Cache-Control", "no-store"),)


@dataclass(frozen=True, slots=True)
class Request:
    """What a page asks of a site."""

    method: str
    host: str
    path: str
    query: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """A site's answer."""

    body: bytes = b""
    status: int = 200
    content_type: str = "text/html; charset=utf-8"
    location: str = ""
    """Where to go instead, with a status of 303."""
    headers: Sequence[tuple[str, str]] = PAGE_HEADERS


Site = Callable[[Request], Response]
"""Answers at once, without waiting for anything."""


@dataclass(frozen=True)
class Allowed:
    """Hosts of the outside: `example.org`, `*.example.org`, `localhost:8023`; without a port, 80 and 443."""

    entries: Sequence[str] = ()

    def names(self, host: str, port: int) -> bool:
        """Whether an entry covers this host and port."""
        return any(self._covers(entry.lower(), host.lower(), port) for entry in self.entries)

    def names_port(self, host: str, port: int) -> bool:
        """Whether an entry names the port as well: only then may it be on this machine or in a private network."""
        return f"{host}:{port}".lower() in {entry.lower() for entry in self.entries}

    @staticmethod
    def _covers(entry: str, host: str, port: int) -> bool:
        name, colon, number = entry.rpartition(":")
        if not colon or not number.isdigit():
            name, number = entry, ""
        if (number and int(number) != port) or (not number and port not in (80, 443)):
            return False
        return host.endswith(name[1:]) and host != name[2:] if name.startswith("*.") else host == name


@dataclass
class Gate:
    """One page's gate; `opened` makes one that listens."""

    sites: Mapping[str, Site] = field(default_factory=dict)
    """Host name -> what answers for it; may be exchanged between two episodes."""
    allowed: Allowed = Allowed()
    refused: list[str] = field(default_factory=list)
    """Hosts that were asked for in vain: the first of them, each once."""
    busy: int = 0
    """Requests that are being answered."""
    port: int = 0
    _connections: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections[task] = writer
        try:
            await self._talk(reader, writer)
        except (OSError, TimeoutError, h11.RemoteProtocolError, h11.LocalProtocolError, ShoalError):
            pass  # The page sees a closed connection, as it would from any server that fails.
        finally:
            del self._connections[task]
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            request = await _next(connection, reader)
            if not isinstance(request, h11.Request):
                return
            if request.method == b"CONNECT":
                await self._tunnel(connection, request.target.decode("ascii", "replace"), reader, writer)
                return
            self.busy += 1
            try:
                keep = await self._answer(connection, request, reader, writer)
            finally:
                self.busy -= 1
            if not keep or connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _answer(
        self,
        connection: h11.Connection,
        request: h11.Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        body = await _body(connection, reader)
        url = urlsplit(request.target.decode("ascii", "replace"))
        host, port = (url.hostname or "").lower(), url.port or 80
        site = self.sites.get(host)
        if site is not None:
            asked = Request(request.method.decode("ascii"), host, url.path or "/", url.query, body)
            response = site(asked)
        elif self._may(host, port):
            await self._forward(request, url.hostname or "", port, body, writer)
            return False
        else:
            response = self._refusal(host)
        headers = [*response.headers, ("Content-Type", response.content_type)]
        headers += [("Content-Length", str(len(response.body)))]
        if response.location:
            headers.append(("Location", response.location))
        out = connection.send(h11.Response(status_code=response.status, headers=headers)) or b""
        if request.method != b"HEAD":
            out += connection.send(h11.Data(data=response.body)) or b""
        out += connection.send(h11.EndOfMessage()) or b""
        writer.write(out)
        async with asyncio.timeout(IDLE_S):
            await writer.drain()
        return True

    def _may(self, host: str, port: int) -> bool:
        return self.allowed.names(host, port)

    def _refusal(self, host: str) -> Response:
        if host not in self.refused and len(self.refused) < MAX_CONNECTIONS:
            self.refused.append(host)
        return Response(b"This address is not allowed.", 403, "text/plain; charset=utf-8")

    async def _forward(
        self, request: h11.Request, host: str, port: int, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        """One plain HTTP request to the outside; its answer ends with the connection."""
        url = urlsplit(request.target.decode("ascii", "replace"))
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        drop = {b"connection", b"proxy-connection", b"transfer-encoding", b"content-length"}
        lines = [f"{request.method.decode('ascii')} {target} HTTP/1.1".encode("ascii")]
        lines += [name + b": " + value for name, value in request.headers if name not in drop]
        lines += [b"connection: close", b"content-length: %d" % len(body)]
        async with _connected(host, port, self.allowed) as (far_reader, far_writer):
            far_writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            await _pump(far_reader, writer)

    async def _tunnel(
        self, connection: h11.Connection, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, _, number = target.rpartition(":")
        host, port = host.strip("[]"), int(number) if number.isdigit() else 0
        if not self._may(host, port):
            self._refusal(host)
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        self.busy += 1
        try:
            async with _connected(host, port, self.allowed) as (far_reader, far_writer):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                far_writer.write(connection.trailing_data[0])
                self.busy -= 1
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(_pump(reader, far_writer))
                        group.create_task(_pump(far_reader, writer))
                except* (OSError, TimeoutError):
                    pass  # Either side closed: so does the tunnel.
                finally:
                    self.busy += 1
        finally:
            self.busy -= 1


@asynccontextmanager
async def opened(sites: Mapping[str, Site], allowed: Allowed) -> AsyncIterator[Gate]:
    """A gate that listens on loopback while the context lasts."""
    gate = Gate(sites=dict(sites), allowed=allowed)
    server = await asyncio.start_server(gate._serve, "127.0.0.1", 0)
    gate.port = server.sockets[0].getsockname()[1]
    try:
        yield gate
    finally:
        server.close()
        for writer in gate._connections.values():
            writer.transport.abort()
        if gate._connections:
            await asyncio.wait(list(gate._connections), timeout=CLOSE_S)


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        async with asyncio.timeout(IDLE_S):
            connection.receive_data(await reader.read(READ_BYTES))


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        event = await _next(connection, reader)
        if isinstance(event, h11.EndOfMessage):
            return bytes(body)
        if not isinstance(event, h11.Data):
            raise RecordError("a request was cut off.")
        body += event.data
        if len(body) > MAX_BODY_BYTES:
            raise RecordError(f"a request has more than {MAX_BODY_BYTES} bytes.")


@asynccontextmanager
async def _connected(
    host: str, port: int, allowed: Allowed
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an address of `host` that may be connected to."""
    async with asyncio.timeout(CONNECT_S):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not allowed.names_port(host, port):
            addresses = [address for address in addresses if ipaddress.ip_address(address).is_global]
        if not addresses:
            raise NetworkError(f"{host} leads to no public address.", f"Allow it as {host}:{port} if it should be.")
        reader, writer = await asyncio.open_connection(addresses[0], port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(IDLE_S):
            data = await reader.read(READ_BYTES)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
