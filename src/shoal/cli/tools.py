"""`shoal tools`: tools that agents call: serve ours as MCP servers, look at those of an mcp.json."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cyclopts import App

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
def serve(name: str, /, *, root: Path | None = None, port: int | None = None, host: str = "127.0.0.1") -> None:
    """Serve built-in tools over MCP, on standard input and output or over HTTP.

    For example:

        shoal tools serve calculator
        shoal tools serve documents --root ~/papers --port 8200

    Args:
        name: calculator, python, documents or corpus.
        root: The folder that documents and corpus read.
        port: Serve streamable HTTP there, at /mcp, instead of standard input and output; 0 takes a free one.
        host: A loopback address to listen on: there are no keys.
    """
    import logging

    need_packages()
    from shoal.agents.builtin.catalogue import builtin_tools
    from shoal.agents.tools.mcp_server import http_app, make_server, serve_stdio
    from shoal.config import is_loopback

    # Standard output is the protocol's, and what a tool's defect says goes to whoever reads standard error.
    logging.basicConfig(level=logging.WARNING)
    server = make_server(name, builtin_tools(name, root))
    if port is None:
        asyncio.run(serve_stdio(server))
        return
    if not is_loopback(host):
        raise ConfigError(f"on {host} everybody could call these tools.", "Listen on 127.0.0.1.")
    asyncio.run(_serve_http(http_app(server, host), host, port))


async def _serve_http(app_: Any, host: str, port: int) -> None:
    from shoal.cli.hosting import host as serve_app
    from shoal.serving.server import listen

    listening = listen(host, port)
    note(f"serving at http://{host}:{listening.getsockname()[1]}/mcp; Ctrl-C ends")
    await serve_app(app_, listening, lifespan=True)


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
