"""MCP servers as tools: started or reached, listed, called, started again when they die, ended.

Invariants: connecting, listing and closing have deadlines (calls have their tool's); a server that we start ends with
us, with all that it has started, and does so even when we are killed; what a server says about itself is bounded and
checked (`ToolCard.check`), and can make a tool more cautious (approval), never less; a call whose connection breaks is
`disconnected`, and the next call starts the server again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import mcp_types
import msgspec
from mcp import MCPError
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from shoal.agents.tools import child
from shoal.agents.tools.caller import CALLER, CALLER_META
from shoal.agents.tools.card import MAX_DESCRIPTION_CHARS, ToolCard
from shoal.agents.tools.function import Progress
from shoal.agents.tools.leftovers import TOKEN_VARIABLE, end_processes
from shoal.agents.tools.mcp_json import ServerConfig, StdioServer
from shoal.agents.tools.outcome import Outcome, failure, success
from shoal.errors import NetworkError

MAX_TOOLS = 1024
"""Of one server; a longer list is cut."""

MAX_PAGES = 64
CLOSE_TIMEOUT_S = 15.0
STARTING_SIGN_S = 0.25
STDERR_TAIL_BYTES = 2000

RETRYABLE_META = "shoal/retryable"
"""Our servers' word in a result's `_meta`: the same call may succeed if it is made again."""


class McpServer:
    """One server, connected from `start` on.

    Args:
        config: where it is, and how its tools may be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.tools: list[McpTool] = []
        self.num_starts = 0
        self._client: Client | None = None
        self._owner: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._starting: asyncio.Task[Client] | None = None
        self._stderr: deque[bytes] = deque(maxlen=STDERR_TAIL_BYTES // 200)

    async def start(self) -> None:
        """Connect and list the tools.

        Raises:
            NetworkError: the server does not start, does not answer in time, or is no MCP server.
            RecordError: one of its tools has a card that cannot be used.
        """
        client = await self._connected(lambda _: None)
        name = self.config.name
        try:
            async with asyncio.timeout(self.config.connect_timeout_s):
                listed = await _list(client)
        except TimeoutError:
            raise self._unreachable("it did not list its tools in time") from None
        except MCPError as error:
            raise self._unreachable(f"it does not list its tools: {error}") from None
        only = self.config.only
        self.tools = [McpTool(self, tool) for tool in listed if only is None or tool.name in only]
        missing = set(only or ()) - {tool.name for tool in listed}
        if missing:
            raise NetworkError(f"the MCP server {name} has no tool {min(missing)!r}.", "Change `only`.")
        for tool in self.tools:
            tool.card.check()

    async def call(self, tool: str, arguments: dict[str, Any], say: Progress) -> mcp_types.CallToolResult:
        """One call; raises `MCPError` where the server answers with an error or the connection breaks."""
        client = await self._connected(say)

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            say(message or (f"{progress:g} of {total:g}" if total else f"{progress:g}"))

        try:
            meta: Any = {CALLER_META: caller} if (caller := CALLER.get()) else None
            return await client.call_tool(tool, arguments, progress_callback=on_progress, meta=meta)
        except MCPError as error:
            # Of many calls that break together the last may hear of it when there is another connection already.
            if error.code == mcp_types.CONNECTION_CLOSED and self._client is client:
                await self._disconnect()
            raise

    async def close(self) -> None:
        """End the connection, and the server where we started it."""
        if (starting := self._starting) is not None:
            starting.cancel()
            await asyncio.wait({starting})
        await self._disconnect()

    async def _connected(self, say: Progress) -> Client:
        """The connection, made anew where there is none.

        Whoever gives up waiting does not stop the start: it serves the next caller, however slow it is. Until its own
        deadline passes, being started is a sign of life.
        """
        if self._client is not None:
            return self._client
        if self._starting is None:
            self._starting = asyncio.create_task(self._connect(), name=f"start of {self.config.name}")
            self._starting.add_done_callback(self._started)
        starting = self._starting
        while not starting.done():
            say("starting its server")
            await asyncio.wait({starting}, timeout=STARTING_SIGN_S)
        return starting.result()

    def _started(self, starting: asyncio.Task[Client]) -> None:
        self._starting = None
        if not starting.cancelled():
            starting.exception()  # Looked at, for the case that nobody waits any more.

    async def _connect(self) -> Client:
        ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        owner = self._owner = asyncio.create_task(self._hold(ready, self._stop), name=f"MCP server {self.config.name}")
        either: set[asyncio.Future[Any]] = {owner, ready}
        try:
            async with asyncio.timeout(self.config.connect_timeout_s):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            await self._disconnect()
            raise self._unreachable(f"no answer within {self.config.connect_timeout_s:g} s") from None
        if not ready.done():
            self._owner = None
            why = "it was ended" if owner.cancelled() else _innermost(owner.exception())
            raise self._unreachable(why) from None
        self._client = ready.result()
        self.num_starts += 1
        return self._client

    async def _hold(self, ready: asyncio.Future[Client], stop: asyncio.Event) -> None:
        """The task that enters the connection's context and leaves it: both must be the same one."""
        async with self._transport() as transport, Client(transport) as client:
            if not ready.done():
                ready.set_result(client)
            await stop.wait()

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        where = self.config.where
        if not isinstance(where, StdioServer):
            async with httpx2.AsyncClient(headers=where.headers, timeout=httpx2.Timeout(30.0, read=None)) as http:
                yield streamable_http_client(where.url, http_client=http)
            return
        command = ["-I", "-S", str(Path(child.__file__)), str(os.getpid()), where.command, *where.args]
        token = secrets.token_hex(16)
        environment = {**where.env, TOKEN_VARIABLE: token}
        parameters = StdioServerParameters(command=sys.executable, args=command, env=environment, cwd=where.cwd)
        read, write = os.pipe()
        with os.fdopen(write, "w") as errlog:
            reading = asyncio.create_task(self._read_stderr(read))
            try:
                yield stdio_client(parameters, errlog=errlog)
            finally:
                reading.cancel()
                await asyncio.wait({reading})
                await asyncio.to_thread(end_processes, token)

    async def _read_stderr(self, descriptor: int) -> None:
        """Keep the end of what the server says on standard error, so that it neither blocks nor fills a disk."""
        reader = asyncio.StreamReader()
        pipe = os.fdopen(descriptor, "rb")
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while data := await reader.read(200):
                self._stderr.append(data)
        finally:
            transport.close()

    async def _disconnect(self) -> None:
        owner, client, self._owner, self._client = self._owner, self._client, None, None
        if owner is None:
            return
        if client is not None:
            self._stop.set()
            await asyncio.wait({owner}, timeout=CLOSE_TIMEOUT_S)
        if not owner.done():
            owner.cancel()
            await asyncio.wait({owner}, timeout=CLOSE_TIMEOUT_S)
        if owner.done() and not owner.cancelled():
            owner.exception()  # The connection is over; how it ended says nothing more.

    def _unreachable(self, why: str) -> NetworkError:
        said = b"".join(self._stderr).decode("utf-8", "replace").strip()[-STDERR_TAIL_BYTES:]
        words = f" It said: {said}" if said else ""
        return NetworkError(f"the MCP server {self.config.name} cannot be used: {why}.{words}", "Check mcp.json.")


class McpTool:
    """One tool of a server."""

    def __init__(self, server: McpServer, listed: mcp_types.Tool) -> None:
        self._server, self._name = server, listed.name
        use = server.config.use_of(listed.name)
        hints = listed.annotations
        if hints is not None and hints.destructive_hint is True and hints.read_only_hint is not True:
            use = msgspec.structs.replace(use, needs_approval=True)
        self.card = ToolCard(
            name=f"{server.config.name}.{listed.name}",
            description=(listed.description or "").strip()[:MAX_DESCRIPTION_CHARS],
            parameters=listed.input_schema,
            output=listed.output_schema,
            use=use,
        )
        inner = _wrapped(listed.output_schema)
        self._is_wrapped = inner is not None
        if inner is not None:
            self.card = msgspec.structs.replace(self.card, output=inner)

    async def call(self, arguments: dict[str, Any], progress: Progress) -> Outcome:
        """One call; the server's faults become failures."""
        try:
            result = await self._server.call(self._name, arguments, progress)
        except NetworkError as error:
            return failure("unavailable", error.problem, retryable=True)
        except MCPError as error:
            if error.code == mcp_types.CONNECTION_CLOSED:
                return failure("disconnected", "the connection to its server broke", retryable=True)
            if error.code == mcp_types.INVALID_PARAMS:
                return failure("arguments", str(error))
            return failure("error", str(error))
        except RuntimeError as error:
            # The SDK's word for structured content that does not match the tool's schema.
            return failure("malformed", str(error), retryable=True)
        if result.is_error:
            retryable = bool((result.meta or {}).get(RETRYABLE_META))
            return failure("error", _text(result.content) or "the tool failed without a word", retryable=retryable)
        if result.structured_content is None:
            return success(_text(result.content))
        return success(_value(result.structured_content, wrapped=self._is_wrapped))


class McpServers:
    """Several servers, started together and ended together: `async with McpServers(configs) as servers`."""

    def __init__(self, configs: Iterable[ServerConfig]) -> None:
        self.servers: Sequence[McpServer] = [McpServer(config) for config in configs]

    @property
    def tools(self) -> list[McpTool]:
        return [tool for server in self.servers for tool in server.tools]

    async def __aenter__(self) -> Self:
        """Raises the first server's `NetworkError` that cannot be started; the others are ended then."""
        started = await asyncio.gather(*(server.start() for server in self.servers), return_exceptions=True)
        for error in started:
            if isinstance(error, BaseException):
                await self._close()
                raise error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(server.close() for server in self.servers), return_exceptions=True)


async def _list(client: Client) -> list[mcp_types.Tool]:
    found: list[mcp_types.Tool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if not cursor or len(found) >= MAX_TOOLS:
            break
    return found[:MAX_TOOLS]


def _wrapped(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema of the value, where a server wraps one that is no object as `{"result": value}`, as the SDKs do."""
    properties = (schema or {}).get("properties")
    if schema is None or not isinstance(properties, dict) or list(properties) != ["result"]:
        return None
    inner = properties["result"]
    return {**inner, **({"$defs": schema["$defs"]} if "$defs" in schema else {})} if isinstance(inner, dict) else None


def _value(structured: Any, *, wrapped: bool) -> Any:
    return structured["result"] if wrapped and isinstance(structured, dict) and "result" in structured else structured


def _text(content: Sequence[Any]) -> str:
    """A result's text; of what is no text, its kind and size."""
    parts: list[str] = []
    for block in content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource) and isinstance(
            block.resource, mcp_types.TextResourceContents
        ):
            parts.append(block.resource.text)
        elif isinstance(block, mcp_types.ResourceLink):
            parts.append(f"[link: {block.uri}]")
        else:
            size = len(getattr(block, "data", "") or "")
            parts.append(
                f"[{block.type}, {getattr(block, 'mime_type', None) or 'unknown'}, {size} characters of base64]"
            )
    return "\n".join(parts)


def _innermost(error: BaseException | None) -> str:
    """What went wrong, out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if error is not None else "it ended at once"
