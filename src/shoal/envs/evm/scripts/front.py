"""Where scripts reach their chain: a small HTTP server on a unix socket that only this user can open.

A sandbox's relay joins its scripts to the socket. Each script has a path of its own, a secret of 128 bits, behind
which its session answers; so many scripts share one server and none reaches another's chain.

Invariants: a path is served from `admit` to `dismiss` and never again; heads, bodies, connections and idle times are
bounded; whatever arrives, the server stays up.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from shoal.envs.evm.scripts.rpc import MAX_BODY_BYTES, RpcSession

MAX_HEAD_BYTES = 16 << 10
IDLE_S = 30.0
"""A connection that says nothing for this long is closed; so is one that does not take its answer."""


class BadRequest(Exception):
    """What arrived is not the HTTP that is spoken here."""


class Front:
    """The server; `open` and `close` it.

    Args:
        max_connections: at once; more are turned away.
    """

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._sessions: dict[str, RpcSession] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, path: Path) -> None:
        """Listen at `path`, in a folder that is private to this user."""
        self._server = await asyncio.start_unix_server(self._accept, str(path), limit=MAX_HEAD_BYTES)

    def admit(self, session: RpcSession) -> str:
        """The path under which the session's script may ask."""
        token = secrets.token_urlsafe(16)
        self._sessions[token] = session
        return token

    def dismiss(self, token: str) -> None:
        """Answer nothing more under this path."""
        self._sessions.pop(token, None)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= self._max_connections:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    token, body = await _read_request(reader)
                    session = self._sessions.get(token)
                    if session is None:
                        writer.write(_response("404 Not Found", b""))
                    else:
                        writer.write(_response("200 OK", session.answer(body)))
                    await writer.drain()
        except BadRequest as problem:
            writer.write(_response("400 Bad Request", str(problem).encode()))
        except (OSError, EOFError, TimeoutError):
            pass  # The other side has gone, or is silent: there is nobody to tell.
        finally:
            writer.close()

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Token and body of one POST.

    Raises:
        BadRequest: it is something else.
        EOFError: the other side has closed.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise BadRequest("the head is too long") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    if method != "POST":
        raise BadRequest("only POST is answered here")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = headers.get("content-length", "")
    if not length.isdecimal() or len(length) > 9 or int(length) > MAX_BODY_BYTES:
        raise BadRequest(f"a body has a content-length of at most {MAX_BODY_BYTES}")
    return rest.partition(" ")[0].lstrip("/"), await reader.readexactly(int(length))


def _response(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
