"""A model behind an OpenAI-compatible endpoint as a policy: hosted ones, other servers, `shoal serve`.

Invariants: a decision is asked for as constrained JSON (`response_format`), and parsed as strictly where the server
ignores that; each request has a deadline, and is tried again only where the server says that it may (429, 5xx) or was
never reached; the key goes to this endpoint and is in no message, log or error.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from shoal.agents.scheduler.decision import Form, decision_schema, parse
from shoal.agents.scheduler.policy import Decided, PolicyError, View
from shoal.agents.scheduler.prompt import messages
from shoal.agents.scheduler.records import Spent

MAX_ANSWER_BYTES = 4 * 2**20
RETRY_WAITS_S = (0.5, 2.0, 8.0)
RETRY_STATUSES = frozenset({408, 409, 429, 500, 502, 503, 504})


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Said(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Said


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where the model is, and how it is used."""

    url: str
    """Up to and including `/v1`."""
    model: str
    key: str = ""
    form: Form = "full"
    max_tokens: int = 2048
    temperature: float = 0.0
    timeout_s: float = 180.0
    usd_per_million_in: float = 0.0
    usd_per_million_out: float = 0.0
    constrained: bool = True
    """Ask for output that matches the decision's schema; off for servers that refuse to be asked."""


class EndpointPolicy:
    """Asks an endpoint for each decision; `async with` it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=endpoint.timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def decide(self, view: View) -> Decided:
        """The next decision; raises `PolicyError` where the endpoint gives none."""
        endpoint = self._endpoint
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages(view, endpoint.form)],
            "max_tokens": endpoint.max_tokens,
            "temperature": endpoint.temperature,
        }
        if endpoint.constrained:
            schema = decision_schema(view.cards, endpoint.form, must_answer=bool(view.must_answer))
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "decision", "schema": schema}}
        data = await self._post(msgspec.json.encode(body))
        try:
            answer = msgspec.json.decode(data, type=_Answer)
        except msgspec.DecodeError as error:
            raise PolicyError(f"{endpoint.url} answered with something else than a completion: {error}.") from None
        if not answer.choices:
            raise PolicyError(f"{endpoint.url} answered without a choice.")
        usage = answer.usage or _Usage()
        usd = usage.prompt_tokens * endpoint.usd_per_million_in + usage.completion_tokens * endpoint.usd_per_million_out
        spent = Spent(tokens_in=max(0, usage.prompt_tokens), tokens_out=max(0, usage.completion_tokens), usd=usd / 1e6)
        decision, problem = parse(answer.choices[0].message.content or "")
        return Decided(decision, problem, spent)

    async def _post(self, body: bytes) -> bytes:
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                async with asyncio.timeout(self._endpoint.timeout_s):
                    status, data = await self._once(body)
            except TimeoutError:
                raise PolicyError(
                    f"{self._endpoint.url} gave no answer within {self._endpoint.timeout_s:g} s."
                ) from None
            except httpx.ConnectError as error:
                status, data = 0, str(error).encode()
            except httpx.HTTPError as error:
                raise PolicyError(f"{self._endpoint.url}: {type(error).__name__}: {error}.") from None
            if status == 200:
                return data
            words = data[:300].decode("utf-8", "replace")
            if wait_s is None or (status and status not in RETRY_STATUSES):
                raise PolicyError(f"{self._endpoint.url} answered {status or 'nothing'}: {words}")
            await asyncio.sleep(wait_s)
        raise AssertionError("the last round returns or raises")

    async def _once(self, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        url = f"{self._endpoint.url.rstrip('/')}/chat/completions"
        async with self._client.stream("POST", url, content=body, headers=headers) as response:
            found = bytearray()
            async for chunk in response.aiter_bytes():
                found += chunk
                if len(found) > MAX_ANSWER_BYTES:
                    raise PolicyError(f"{self._endpoint.url} answered with more than {MAX_ANSWER_BYTES} bytes.")
            return response.status_code, bytes(found)
