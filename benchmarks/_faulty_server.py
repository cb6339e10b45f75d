"""An MCP server whose tool misbehaves as its caller says: an error, a hang, garbage, a crash of the whole server."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import mcp_types
from mcp.server.lowlevel import Server

from shoal.agents.tools.mcp_server import serve_stdio

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "fault": {"type": "string"}},
    "required": ["n", "fault"],
}
OUTPUT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


async def list_tools(*_: Any) -> mcp_types.ListToolsResult:
    tool = mcp_types.Tool(name="work", description="Doubles n.", input_schema=SCHEMA, output_schema=OUTPUT)
    return mcp_types.ListToolsResult(tools=[tool])


async def call_tool(_: Any, params: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
    arguments = params.arguments or {}
    found: dict[str, Any] = {"n": 2 * arguments["n"]}
    await asyncio.sleep(0.01)
    match arguments["fault"]:
        case "error":
            text = mcp_types.TextContent(type="text", text="it does not work")
            return mcp_types.CallToolResult(content=[text], is_error=True)
        case "hang":
            await asyncio.sleep(3600)
        case "garbage":
            found = {"n": "no number"}
        case "crash":
            os._exit(1)
        case "disconnect":
            os.close(1)
            await asyncio.sleep(3600)
    text = mcp_types.TextContent(type="text", text=str(found))
    return mcp_types.CallToolResult(content=[text], structured_content=found)


if __name__ == "__main__":
    asyncio.run(serve_stdio(Server("faulty", on_list_tools=list_tools, on_call_tool=call_tool)))
