"""An agent elsewhere as a tool: a URL and a description of what it can do.

    {"agents": {"researcher": {"url": "http://host:8100/v1", "description": "finds papers", "speaks": "runs"},
                "writer": {"url": "https://host/v1", "description": "writes texts", "speaks": "chat", "model": "m"}}}

`runs`: our HTTP interface (`agents/http`): the task becomes a run there, whose events are signs of life. `chat`: any
OpenAI-compatible endpoint; the task is the one message. Both stand in the same file as MCP servers (`mcp_json`).

Invariants: the address is the user's, and nothing else is asked; answers are bounded; a call that is given up cancels
the run that it started; a key goes to this address only and is in no message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import msgspec

from shoal.agents.tools.card import ToolCard, Use
from shoal.agents.tools.function import Progress
from shoal.agents.tools.outcome import Outcome, failure, success

MAX_ANSWER_BYTES = 4 * 2**20
MAX_EVENT_BYTES = 2**20
MAX_TASK_CHARS = 64 * 1024
CONNECT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 5.0
RETRY_STATUSES = frozenset({429, 502, 503, 504})


class RemoteAgent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an agent is, and what it is good for."""

    name: str
    url: str
    """Up to and including `/v1`."""
    description: str
    speaks: Literal["runs", "chat"] = "runs"
    model: str = ""
    """For `chat`: what the endpoint calls it."""
    headers: dict[str, str] = {}
    use: Use = Use(timeout_s=600, max_concurrency=4)


class _Run(msgspec.Struct):
    id: str
    status: str = ""
    answer: str | None = None
    error: str | None = None


class _Said(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Said


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class RemoteAgentTool:
    """A remote agent behind a card; it answers with text."""

    def __init__(self, agent: RemoteAgent) -> None:
        self._agent = agent
        self._url = agent.url.rstrip("/")
        task = {"type": "string", "minLength": 1, "maxLength": MAX_TASK_CHARS, "description": "what to do, in words"}
        self.card = ToolCard(
            name=agent.name,
            description=agent.description,
            parameters={
                "type": "object",
                "properties": {"task": task},
                "required": ["task"],
                "additionalProperties": False,
            },
            output={"type": "string"},
            use=agent.use,
        )
        self.card.check()

    async def call(self, arguments: dict[str, Any], progress: Progress) -> Outcome:
        """One task."""
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=self._agent.use.timeout_s)
        async with httpx.AsyncClient(headers=self._agent.headers, timeout=timeout, trust_env=False) as client:
            try:
                if self._agent.speaks == "chat":
                    return await self._chat(client, arguments["task"])
                return await self._run(client, arguments["task"], progress)
            except httpx.ConnectError as error:
                return failure("unavailable", f"the agent cannot be reached: {error}", retryable=True)
            except httpx.HTTPError as error:
                return failure("disconnected", f"{type(error).__name__}: {error}", retryable=True)
            except msgspec.DecodeError as error:
                return failure("malformed", f"it is no such agent: {error}")

    async def _chat(self, client: httpx.AsyncClient, task: str) -> Outcome:
        body = {"model": self._agent.model, "messages": [{"role": "user", "content": task}]}
        status, data = await _post(client, f"{self._url}/chat/completions", body)
        if status != 200:
            return _refusal(status, data)
        found = msgspec.json.decode(data, type=_Completion)
        if not found.choices:
            return failure("malformed", "it answered without a choice")
        return success(found.choices[0].message.content or "")

    async def _run(self, client: httpx.AsyncClient, task: str, progress: Progress) -> Outcome:
        status, data = await _post(client, f"{self._url}/runs", {"task": task})
        if status != 201:
            return _refusal(status, data)
        run = msgspec.json.decode(data, type=_Run).id
        where = f"{self._url}/runs/{run}"
        ended = False
        try:
            async for kind in _events(client, f"{where}/events"):
                progress(kind)
            ended = True
            status, data = await _bounded(client, client.build_request("GET", where))
        finally:
            if not ended:
                await self._cancel(where)
        if status != 200:
            return _refusal(status, data)
        found = msgspec.json.decode(data, type=_Run)
        if found.answer is not None:
            return success(found.answer)
        return failure("error", f"{found.status}: {found.error or 'it ended without an answer'}")

    async def _cancel(self, where: str) -> None:
        """Tell the other side that nobody waits any more; with a client of its own, since the call's may be broken."""
        with_key = self._agent.headers
        try:
            async with (
                asyncio.timeout(CANCEL_TIMEOUT_S),
                httpx.AsyncClient(headers=with_key, timeout=CANCEL_TIMEOUT_S, trust_env=False) as client,
            ):
                await client.post(f"{where}/cancel")
        except (httpx.HTTPError, TimeoutError):
            return  # It has its own budget, and ends by that.


async def _post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    return await _bounded(client, client.build_request("POST", url, content=msgspec.json.encode(body), headers=headers))


async def _bounded(client: httpx.AsyncClient, request: httpx.Request) -> tuple[int, bytes]:
    response = await client.send(request, stream=True)
    try:
        found = bytearray()
        async for part in response.aiter_bytes():
            found += part
            if len(found) > MAX_ANSWER_BYTES:
                raise httpx.RemoteProtocolError(f"it answered with more than {MAX_ANSWER_BYTES} bytes")
        return response.status_code, bytes(found)
    finally:
        await response.aclose()


async def _events(client: httpx.AsyncClient, url: str) -> AsyncIterator[str]:
    """The kinds of a run's events, to its end."""
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise httpx.RemoteProtocolError(f"its events answered {response.status_code}")
        rest = b""
        async for part in response.aiter_bytes():
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > MAX_EVENT_BYTES:
                raise httpx.RemoteProtocolError("one of its events is too long")
            for line in lines:
                if line.startswith(b"event: "):
                    yield line[7:100].decode("utf-8", "replace").strip()


def _refusal(status: int, data: bytes) -> Outcome:
    words = data[:300].decode("utf-8", "replace")
    return failure("error", f"it answered {status}: {words}", retryable=status in RETRY_STATUSES)
