"""OpenEnv's protocol: one WebSocket is one episode's own environment on the server.

    ──▶ {"type": "reset", "data": {"seed": 7}}            ◀── {"type": "observation", "data": {"observation": {…},
    ──▶ {"type": "step", "data": {…the action…}}                "reward": 0.5, "done": false}}
    ──▶ {"type": "close"}                                 ◀── {"type": "error", "data": {"message": …, "code": …}}

Beside it stand plain requests: the schema of actions (`/schema`), how many tasks a split has (`/NAME/num_tasks`).

Invariants: every message has a deadline and a largest size, and is checked before anything reads it; whatever goes
wrong is a `NetworkError`, never an observation; a server that is full is asked again until the deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from shoal.config import is_loopback
from shoal.errors import ConfigError, NetworkError

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import WebSocketException

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_REASON_CHARS = 300
MAX_TOOLS = 256

FULL = "CAPACITY_REACHED"
FULL_PAUSE_S = 0.25
"""Before a full server is asked again; twice as long each time."""
FULL_LONGEST_PAUSE_S = 1.0

CLOSE_TIMEOUT_S = 5.0


class Observed(msgspec.Struct, frozen=True):
    """What the environment answers."""

    observation: dict[str, Any]
    reward: float | bool | None = None
    done: bool = False


class Tool(msgspec.Struct, frozen=True):
    """A tool of an environment that is acted in by tool calls."""

    name: str
    description: str | None = None
    inputSchema: dict[str, Any] = {}


class _Frame(msgspec.Struct, frozen=True):
    type: str
    data: dict[str, Any] = {}


class _Listed(msgspec.Struct, frozen=True):
    tools: list[Tool]


class _Schemas(msgspec.Struct, frozen=True):
    action: dict[str, Any]


class _Counted(msgspec.Struct, frozen=True):
    num_tasks: int


T = TypeVar("T")


class Refused(NetworkError):
    """The server's own word that something went wrong there; `code` is the protocol's."""

    def __init__(self, where: str, data: Mapping[str, Any]) -> None:
        self.code = str(data.get("code", ""))[:64]
        self.complaint = _complaint(data)
        remedy = "Raise the server's max_concurrent_envs, or lower `parallel`." if self.code == FULL else ""
        super().__init__(f"{where} answers {self.code or 'with an error'}: {self.complaint}", remedy)


def _complaint(data: Mapping[str, Any]) -> str:
    """What is wrong, in the server's words; of a list of errors the first."""
    errors = data.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    if isinstance(first, Mapping):
        place = first.get("loc")
        path = ".".join(str(part) for part in place) if isinstance(place, list) else ""
        return f"{path}: {first.get('msg', '')}"[:MAX_REASON_CHARS]
    return str(data.get("message", ""))[:MAX_REASON_CHARS]


@dataclass(frozen=True)
class Server:
    """Where an OpenEnv server is, and how long it may take over one answer."""

    base_url: str
    """As `http://127.0.0.1:8000`."""
    timeout_s: float
    key_variable: str = ""
    """The variable of this process's environment that holds a bearer token, if the server wants one."""

    async def begun(self, data: Mapping[str, Any]) -> tuple[Session, Observed]:
        """A session, and what its environment says when it is reset with `data`.

        Raises:
            NetworkError: the server does not answer, or answers with an error.
        """
        pause, end = FULL_PAUSE_S, asyncio.get_running_loop().time() + self.timeout_s
        while True:
            session = await self._opened()
            try:
                return session, await session.reset(data)
            except Refused as error:
                await session.close()
                if error.code != FULL or asyncio.get_running_loop().time() + pause > end:
                    raise
            except BaseException:
                await session.close()
                raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, FULL_LONGEST_PAUSE_S)

    async def _opened(self) -> Session:
        connect, failures = _websockets()
        parts = urlsplit(self.base_url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        try:
            socket = await connect(
                f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}/ws",
                additional_headers=self._headers,
                proxy=None if self._is_local else True,
                max_size=MAX_MESSAGE_BYTES,
                open_timeout=self.timeout_s,
                ping_timeout=self.timeout_s,  # an environment that computes may keep its server from answering pings
                close_timeout=CLOSE_TIMEOUT_S,
            )
        except (OSError, TimeoutError, ValueError, failures) as error:
            raise self._silent(error) from None
        return Session(socket, self._where, self.timeout_s)

    async def action_schema(self) -> dict[str, Any]:
        """The JSON schema of the environment's actions; raises `NetworkError`."""
        async with httpx.AsyncClient(timeout=self.timeout_s, trust_env=not self._is_local) as client:
            try:
                answer = await client.get(f"{self._root}/schema", headers=self._headers)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._silent(error) from None
        return self._body(answer, _Schemas).action

    def num_tasks(self, split: str) -> int:
        """How many tasks a split of the server's task list has; raises `NetworkError`."""
        with httpx.Client(timeout=self.timeout_s, trust_env=not self._is_local, headers=self._headers) as client:
            try:
                (name, *_) = self._body(client.get(f"{self._root}/list_environments"), list[str]) or [""]
                answer = client.post(f"{self._root}/{quote(name, safe='')}/num_tasks", json={"split": split})
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._silent(error) from None
        return self._body(answer, _Counted).num_tasks

    def _body(self, answer: httpx.Response, kind: type[T]) -> T:
        if answer.status_code != 200 or len(answer.content) > MAX_MESSAGE_BYTES:
            path = answer.request.url.path
            raise NetworkError(f"{self._where} answers {answer.status_code} to {path}: {answer.text[:200]}")
        return _read(answer.content, kind, self._where)

    def _silent(self, error: Exception) -> NetworkError:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return NetworkError(f"{self._where} does not answer: {reason[0]}.", "Start it, or correct base_url.")

    @property
    def _where(self) -> str:
        return f"the OpenEnv server at {self.base_url}"

    @property
    def _root(self) -> str:
        return self.base_url.rstrip("/")

    @property
    def _is_local(self) -> bool:
        """Then no proxy of the machine's settings stands between."""
        return is_loopback(urlsplit(self.base_url).hostname or "")

    @property
    def _headers(self) -> dict[str, str]:
        token = os.environ.get(self.key_variable, "") if self.key_variable else ""
        return {"Authorization": f"Bearer {token}"} if token else {}


class Session:
    """One episode's environment on the server."""

    def __init__(self, socket: ClientConnection, where: str, timeout_s: float) -> None:
        self._socket, self._where, self._timeout_s = socket, where, timeout_s

    async def reset(self, data: Mapping[str, Any]) -> Observed:
        return self._observed(await self._ask("reset", json.dumps(data)))

    async def step(self, action: str) -> Observed:
        """Act; `action` is JSON. Raises `Refused`, with the code `VALIDATION_ERROR` where it is no action here."""
        return self._observed(await self._ask("step", action))

    async def tools(self) -> tuple[Tool, ...]:
        """The tools that the environment offers."""
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
        answer = await self._ask("mcp", json.dumps(asked))
        if (error := answer.data.get("error")) is not None:
            raise Refused(self._where, error if isinstance(error, Mapping) else {"message": error})
        found = _convert(answer.data.get("result"), _Listed, self._where).tools
        if not 1 <= len(found) <= MAX_TOOLS:
            raise NetworkError(f"{self._where} offers {len(found)} tools, not 1 to {MAX_TOOLS}.")
        return tuple(found)

    async def close(self) -> None:
        """End the session; the server lets go of its environment."""
        _, failures = _websockets()
        with suppress(failures, OSError, TimeoutError):
            async with asyncio.timeout(2 * CLOSE_TIMEOUT_S):
                await self._socket.send('{"type": "close"}')
                await self._socket.close()

    async def _ask(self, kind: str, data: str) -> _Frame:
        _, failures = _websockets()
        try:
            async with asyncio.timeout(self._timeout_s):
                with suppress(failures):
                    # A session that is refused is told so and closed, perhaps before this is written.
                    await self._socket.send(f'{{"type": "{kind}", "data": {data}}}')
                raw = await self._socket.recv()
        except TimeoutError:
            raise NetworkError(f"{self._where} took longer than {self._timeout_s:g} s.", "Raise timeout_s.") from None
        except (OSError, failures) as error:
            raise NetworkError(f"{self._where} ended the session: {error}.", "Its own log says why.") from None
        frame = _read(raw, _Frame, self._where)
        if frame.type == "error":
            raise Refused(self._where, frame.data)
        return frame

    def _observed(self, frame: _Frame) -> Observed:
        if frame.type != "observation":
            raise NetworkError(f"{self._where} answers with {frame.type[:40]!r} instead of an observation.")
        return _convert(frame.data, Observed, self._where)


def _read(raw: str | bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NetworkError(f"{where} does not speak OpenEnv's protocol: {error}.", "Correct base_url.") from None


def _convert(value: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise NetworkError(f"{where} does not speak OpenEnv's protocol: {error}.") from None


def require_websockets() -> None:
    """Raise `ConfigError` where the package is missing: before a run, not in each of its episodes."""
    if find_spec("websockets") is None:
        raise ConfigError(
            "an OpenEnv environment needs the package websockets, which is not installed.",
            "Install it: pip install 'shoal[openenv]'.",
        )


def _websockets() -> tuple[type[connect], type[WebSocketException]]:
    """Loaded when they are used: whoever only looks through the environments need not have them."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    return connect, WebSocketException
