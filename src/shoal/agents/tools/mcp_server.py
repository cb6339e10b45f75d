"""Our tools as an MCP server, over standard input and output or streamable HTTP.

Invariants: arguments are checked against the card before the function sees them; no more calls of a tool run at once
than its card says, whoever asks; a failure goes out in the tool's own words with `isError`, and says in `_meta` whether
trying again can help; a defect is the SDK's to answer, without its insides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import mcp_types
import msgspec
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from starlette.applications import Starlette

import shoal
from shoal.agents.tools.caller import CALLER, CALLER_META, MAX_CALLER_CHARS
from shoal.agents.tools.card import ToolCard
from shoal.agents.tools.function import Progress
from shoal.agents.tools.mcp_client import RETRYABLE_META
from shoal.agents.tools.outcome import Failure, Outcome, failure
from shoal.agents.tools.schema import Schema
from shoal.agents.tools.toolbox import Callee

PROGRESS_EVERY_S = 0.25
"""What a tool says in between is passed over: the newest words are sent."""


def make_server(name: str, callees: Sequence[Callee]) -> Server[Any]:
    """An MCP server that offers these tools."""
    tools = {callee.card.name: (callee, Schema(callee.card.parameters, callee.card.name)) for callee in callees}
    places = {name: asyncio.Semaphore(callee.card.use.max_concurrency) for name, (callee, _) in tools.items()}

    async def list_tools(_: Any, __: mcp_types.PaginatedRequestParams | None) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[_described(callee.card) for callee, _ in tools.values()])

    async def call_tool(context: Any, params: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        if params.name not in tools:
            return _failed(failure("arguments", f"there is no tool {params.name[:100]!r}"))
        callee, schema = tools[params.name]
        arguments = params.arguments or {}
        if problem := schema.problem(arguments):
            return _failed(failure("arguments", problem))
        caller = (params.meta or {}).get(CALLER_META, "")
        CALLER.set(caller[:MAX_CALLER_CHARS] if isinstance(caller, str) else "")
        async with _telling(context) as say, places[params.name]:
            outcome = await callee.call(arguments, say)
        return _failed(outcome) if isinstance(outcome, Failure) else _done(callee.card, outcome)

    return Server(name, version=shoal.__version__, on_list_tools=list_tools, on_call_tool=call_tool)


async def serve_stdio(server: Server[Any]) -> None:
    """Serve until standard input ends."""
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def http_app(server: Server[Any], host: str, *, progress: bool = False) -> Starlette:
    """The server as an ASGI application, at `/mcp`.

    Args:
        progress: answer each call with a stream that carries its signs of life, for tools that take long.
    """
    return server.streamable_http_app(host=host, stateless_http=True, json_response=not progress)


@asynccontextmanager
async def _telling(context: Any) -> AsyncIterator[Progress]:
    """A tool's words about its progress, sent to whoever asked for them."""
    words: asyncio.Queue[str] = asyncio.Queue(1)

    def say(text: str) -> None:
        if words.full():
            words.get_nowait()
        words.put_nowait(text)

    async def send() -> None:
        count = 0
        while True:
            text = await words.get()
            count += 1
            await context.session.report_progress(count, message=text[:200])
            await asyncio.sleep(PROGRESS_EVERY_S)

    sending = asyncio.create_task(send())
    try:
        yield say
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def _described(card: ToolCard) -> mcp_types.Tool:
    output = card.output
    if output is not None and output.get("type") != "object":
        inner = {key: value for key, value in output.items() if key != "$defs"}
        defs = {"$defs": output["$defs"]} if "$defs" in output else {}
        output = {"type": "object", "properties": {"result": inner}, "required": ["result"], **defs}
    hints = mcp_types.ToolAnnotations(
        idempotent_hint=card.use.idempotent, destructive_hint=card.use.needs_approval, read_only_hint=False
    )
    return mcp_types.Tool(
        name=card.name,
        description=card.description,
        input_schema=card.parameters,
        output_schema=output,
        annotations=hints,
    )


def _done(card: ToolCard, outcome: Outcome) -> mcp_types.CallToolResult:
    assert not isinstance(outcome, Failure)
    value = outcome.value
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    structured = value if isinstance(value, dict) else {"result": value}
    return mcp_types.CallToolResult(
        content=[mcp_types.TextContent(type="text", text=text)], structured_content=structured
    )


def _failed(found: Failure) -> mcp_types.CallToolResult:
    text = mcp_types.TextContent(type="text", text=found.message)
    meta = {RETRYABLE_META: True} if found.retryable else None
    return mcp_types.CallToolResult(content=[text], is_error=True, _meta=meta)
