"""The `mcp.json` that users have: which MCP servers there are, and how their tools may be used.

    {"mcpServers": {
        "files": {"command": "npx", "args": ["-y", "@modelcontextprotocol/server-filesystem", "/data"]},
        "search": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer ${SEARCH_KEY}"},
                   "shoal": {"timeout_s": 20, "tools": {"find": {"idempotent": true}}, "only": ["find"]}}}}

`shoal` is our own addition; other programs ignore it. `${NAME}` is taken from the environment, so that a key need not
stand in the file. Other agents stand there too, as URLs with descriptions (`remote_agent`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from shoal.agents.tools.card import Use
from shoal.agents.tools.remote_agent import RemoteAgent
from shoal.errors import ConfigError, RecordError

MAX_FILE_BYTES = 2**20
MAX_SERVERS = 256

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,48}")


class StdioServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server that we start, and talk to over its standard input and output."""

    command: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None


class HttpServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server elsewhere, over streamable HTTP."""

    url: str
    headers: dict[str, str] = {}


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One server and how its tools may be used."""

    name: str
    where: StdioServer | HttpServer
    use: Use = Use()
    """For tools without an entry in `tools`."""
    tools: dict[str, Use] = {}
    only: tuple[str, ...] | None = None
    """The tools that are offered; absent: all that the server has."""
    connect_timeout_s: float = 30.0

    def use_of(self, tool: str) -> Use:
        return self.tools.get(tool, self.use)


def read_mcp_json(path: Path) -> list[ServerConfig]:
    """The servers of a file.

    Raises:
        ConfigError: it is missing, malformed, or names a variable that is not set.
    """
    document = _document(path)
    servers = document.get("mcpServers", document.get("servers", {} if "agents" in document else None))
    if not isinstance(servers, dict) or len(servers) > MAX_SERVERS:
        raise ConfigError(f"{path} has no mcpServers, or more than {MAX_SERVERS}.")
    return [_server(path, name, entry) for name, entry in servers.items()]


def read_agents(path: Path) -> list[RemoteAgent]:
    """The other agents of a file; raises `ConfigError` as `read_mcp_json` does."""
    agents = _document(path).get("agents", {})
    if not isinstance(agents, dict) or len(agents) > MAX_SERVERS:
        raise ConfigError(f"{path}: its agents are no object, or more than {MAX_SERVERS}.")
    return [_agent(path, name, entry) for name, entry in agents.items()]


def _document(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Name a file with mcpServers.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes; {MAX_FILE_BYTES} are allowed.")
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None


def _agent(path: Path, name: str, entry: Any) -> RemoteAgent:
    where = f"{path}, agent {name!r}"
    if not _NAME.fullmatch(name) or not isinstance(entry, dict):
        raise ConfigError(f"{where}: it is no object, or its name has other than 1 to 48 letters, digits, '_' and '-'.")
    entry = _expanded(entry, where)
    try:
        use = msgspec.convert({"timeout_s": 600.0, "max_concurrency": 4, **(entry.pop("shoal", None) or {})}, Use)
        made = msgspec.convert({**entry, "name": name, "use": use}, RemoteAgent)
        use.check()
    except (msgspec.ValidationError, RecordError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}.") from None
    return made


def _server(path: Path, name: str, entry: Any) -> ServerConfig:
    where = f"{path}, server {name!r}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name has 1 to 48 letters, digits, '_' and '-'.")
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: it is no object.")
    entry = _expanded(entry, where)
    try:
        ours = dict(entry.get("shoal") or {})
        tools = {
            tool: msgspec.convert(_merged(ours, use), Use) for tool, use in (ours.pop("tools", None) or {}).items()
        }
        only = ours.pop("only", None)
        connect_timeout_s = float(ours.pop("connect_timeout_s", 30.0))
        use = msgspec.convert(ours, Use)
        kind: type[StdioServer | HttpServer] = StdioServer if "command" in entry else HttpServer
        made = ServerConfig(
            name=name,
            where=msgspec.convert({key: entry[key] for key in kind.__struct_fields__ if key in entry}, kind),
            use=use,
            tools=tools,
            only=None if only is None else tuple(only),
            connect_timeout_s=connect_timeout_s,
        )
        for one in (use, *tools.values()):
            one.check()
    except (msgspec.ValidationError, RecordError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}.") from None
    return made


def _merged(base: dict[str, Any], use: Any) -> dict[str, Any]:
    own = ("tools", "only", "connect_timeout_s")
    return {**{key: value for key, value in base.items() if key not in own}, **dict(use)}


def _expanded(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _variable(found[1], where), value)
    if isinstance(value, dict):
        return {key: _expanded(item, where) for key, item in value.items()}
    return [_expanded(item, where) for item in value] if isinstance(value, list) else value


def _variable(name: str, where: str) -> str:
    if name not in os.environ:
        raise ConfigError(f"{where}: the variable {name} is not set.", f"Set {name} in the environment.")
    return os.environ[name]
