"""One answer of a model through OpenAI's API, streamed, with what it took.

Invariants: no answer is longer than `MAX_TOKENS` or takes longer than `ANSWER_S`; what the server says is bounded and
typed before it is used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from shoal.errors import ConfigError, NetworkError, ShoalError
from shoal.protocol.chat import Message
from shoal.serving.console.asked import client_of, fetched, samples

ANSWER_S = 300.0
CONNECT_S = 5.0
MAX_TOKENS = 1024
MAX_LINE_BYTES = 1 << 20

ROUNDS, ACCEPTED = "shoal_speculation_rounds_total", "shoal_tokens_accepted_total"
"""A server's counters, where it drafts."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked."""

    url: str
    """Up to and without `/v1`."""
    model: str
    key: str = ""


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """What the playground's form asks for."""

    voice: str
    messages: list[Message]
    draft: str = ""
    """A drafter for speculative decoding; empty: none."""
    temperature: float = 0.7
    max_tokens: int = 256
    seed: int | None = None

    def check(self) -> None:
        """Raises `ConfigError` where a value is out of range."""
        if not 1 <= len(self.messages) <= 64 or not 1 <= self.max_tokens <= MAX_TOKENS:
            raise ConfigError(f"between 1 and 64 messages and up to {MAX_TOKENS} tokens can be asked for.")
        if not 0 <= self.temperature <= 2:
            raise ConfigError("a temperature is between 0 and 2.")


async def answered(endpoint: Endpoint, ask: Ask) -> AsyncGenerator[dict[str, Any]]:
    """The pieces of one answer, and at last what it took.

    Raises:
        NetworkError: the server refuses, or does not answer.
    """
    body = {
        "model": endpoint.model,
        "messages": [{"role": m.role, "content": m.content} for m in ask.messages],
        "temperature": ask.temperature,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.seed is not None:
        body["seed"] = ask.seed
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    started, first, tokens = time.monotonic(), 0.0, 0
    try:
        async with (
            asyncio.timeout(ANSWER_S),
            client_of(endpoint.url, endpoint.key, timeout) as client,
        ):
            before = await _rounds(client, endpoint)
            started = time.monotonic()
            async with client.stream("POST", f"{endpoint.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise NetworkError(_refusal(await response.aread(), response.status_code))
                async for line in response.aiter_lines():
                    piece, drawn = _piece(line)
                    tokens = max(tokens, drawn)
                    if piece:
                        first = first or time.monotonic() - started
                        yield {"text": piece}
            seconds = time.monotonic() - started
            after = await _rounds(client, endpoint)
    except TimeoutError:
        raise NetworkError(f"the answer took longer than {ANSWER_S:.0f} s.") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NetworkError(f"the server does not answer: {str(error) or type(error).__name__}.") from None
    done: dict[str, Any] = {"tokens": tokens, "seconds": round(seconds, 3), "first_s": round(first, 3)}
    if (rounds := after[0] - before[0]) > 0:
        # A round gives one token of the target's own beside those that were accepted.
        done |= {"rounds": int(rounds), "tokens_per_round": round(1 + (after[1] - before[1]) / rounds, 2)}
    yield {"done": done}


async def _rounds(client: httpx.AsyncClient, endpoint: Endpoint) -> tuple[float, float]:
    """Rounds of speculation and tokens accepted so far; zeros where the server does not draft or tell."""
    try:
        found = samples(await fetched(client, f"{endpoint.url}/metrics"))
    except ShoalError:
        return 0.0, 0.0
    return found.get(ROUNDS, 0.0), found.get(ACCEPTED, 0.0)


def _piece(line: str) -> tuple[str, int]:
    """The text in one line of the stream, and the tokens so far where it tells them."""
    if not line.startswith("data: ") or line == "data: [DONE]" or len(line) > MAX_LINE_BYTES:
        return "", 0
    try:
        found = msgspec.json.decode(line[6:], type=dict[str, Any])
    except msgspec.DecodeError:
        raise NetworkError("the server's answer is no stream of events.") from None
    if isinstance(error := found.get("error"), dict):
        raise NetworkError(str(error.get("message", "the answer broke off"))[:500])
    choices, usage = found.get("choices"), found.get("usage")
    drawn = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
    text = ""
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        delta = choices[0].get("delta")
        if isinstance(delta, dict):
            text = "".join(str(delta.get(key) or "") for key in ("reasoning_content", "content"))
    return text, drawn if isinstance(drawn, int) else 0


def _refusal(body: bytes, status: int) -> str:
    try:
        return str(msgspec.json.decode(body, type=dict[str, dict[str, Any]])["error"]["message"])[:500]
    except (msgspec.DecodeError, KeyError):
        return f"the server answers {status}."
