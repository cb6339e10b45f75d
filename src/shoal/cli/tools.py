"""`shoal tools`: tools that agents call: serve ours as MCP servers, look at those of an mcp.json."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError

app = App(name="tools", help="Serve Shoal's tools over MCP, and look at the tools of an mcp.json.")

PACKAGES = ("mcp", "mcp_types", "jsonschema_rs", "opentelemetry", "pypdf")
"""What comes with the extra `agents`."""


def need_packages() -> None:
    """Raise `ConfigError` where the packages that agents need are not installed."""
    for name in PACKAGES:
        if find_spec(name) is None:
            raise ConfigError(f"agents need the package {name}.", "Install it: pip install 'shoal[agents]'.")


@app.command
def serve(
    *names: str,
    root: Path | None = None,
    search_url: str = "",
    allow: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    port: int | None = None,
    host: str = "127.0.0.1",
) -> None:
    """Serve built-in tools over MCP, on standard input and output or over HTTP.

    For example:

        shoal tools serve calculator
        shoal tools serve documents corpus --root ~/papers --port 8200
        shoal tools serve web --search-url https://searx.example.org
        shoal tools serve browser --allow example.org --allow 127.0.0.1:8000

    Args:
        names: Which; shoal tools list shows them.
        root: The folder that documents and corpus read and pages writes, or where memory keeps its file.
        search_url: The search service of web: a SearXNG instance, or an address with {query} in it.
        allow: A host that browser may reach, or that web may read although it is not public; several times for more.
        port: Serve streamable HTTP there, at /mcp, instead of standard input and output; 0 takes a free one.
        host: A loopback address to listen on: there are no keys.
    """
    import logging

    need_packages()
    from shoal.agents.builtin.catalogue import BUILTIN, Surroundings, builtin_tools
    from shoal.agents.tools.mcp_server import make_server, serve_stdio

    if not names:
        raise ConfigError("no tools are named.", f"There are: {', '.join(BUILTIN)}.")
    # Standard output is the protocol's, and what a tool's defect says goes to whoever reads standard error.
    logging.basicConfig(level=logging.WARNING)
    given = Surroundings(root, search_url, allow)
    server = make_server("-".join(names), [tool for name in names for tool in builtin_tools(name, given)])
    asyncio.run(serve_stdio(server) if port is None else serve_over_http(server, host, port))


async def serve_over_http(server: Any, host: str, port: int, *, progress: bool = False) -> None:
    """Serve an MCP server over streamable HTTP until Ctrl-C; raises `ConfigError` beyond loopback."""
    from shoal.agents.tools.mcp_server import http_app
    from shoal.cli.hosting import host as serve_app
    from shoal.config import is_loopback
    from shoal.serving.server import listen

    if not is_loopback(host):
        raise ConfigError(f"on {host} everybody could call these tools.", "Listen on 127.0.0.1.")
    listening = listen(host, port)
    note(f"serving at http://{host}:{listening.getsockname()[1]}/mcp; Ctrl-C ends")
    await serve_app(http_app(server, host, progress=progress), listening, lifespan=True)


@app.command(name="list")
def list_(file: Path | None = None, /, *, json: Json = False) -> None:
    """List the tools of an mcp.json, started for that, or our own.

    For example:

        shoal tools list mcp.json

    Args:
        file: An mcp.json; without one, the built-in tools' names.
    """
    need_packages()
    from shoal.agents.builtin.catalogue import BUILTIN
    from shoal.agents.tools.mcp_json import read_mcp_json

    if file is None:
        if json:
            print_json({"builtin": BUILTIN})
            return
        for name, about in BUILTIN.items():
            console().print(f"{name:12} {about}", markup=False)
        return
    cards = asyncio.run(_cards(read_mcp_json(file)))
    if json:
        print_json({"tools": cards})
        return
    for card in cards:
        first = card["description"].partition("\n")[0]
        console().print(f"{card['name']:40} {first}", markup=False, soft_wrap=True)


async def _cards(configs: Any) -> list[dict[str, Any]]:
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.protocol.codec import builtins

    async with McpServers(configs) as servers:
        return [builtins(tool.card) for tool in servers.tools]
