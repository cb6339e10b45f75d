"""Whoever answers a conversation in an evaluation: an engine on this machine, or a server with OpenAI's API.

Invariants: an answer is the model's, or an error: a server that is busy, slow or gone is asked again a bounded number
of times, each with a deadline, and then that is a `NetworkError` and never an empty answer; what a server sends is
bounded and typed. A server's key is sent to that server alone, and is in no message and no file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx
import msgspec

from shoal.engine.local import LocalEngine
from shoal.errors import ConfigError, ModelError, NetworkError, ShoalError
from shoal.protocol.chat import Message
from shoal.protocol.sampling import Grammar, SampleRequest, SamplingParams

ATTEMPTS = 5
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
ANSWER_S = 600.0
"""A server's whole answer arrives within this long."""
CONNECT_S = 10.0
MAX_ANSWER_BYTES = 8 << 20
MAX_SAID_CHARS = 300
"""Of a server's own words in an error."""

NEW_LIMIT = "max_completion_tokens"

BUSY = (408, 409, 425, 429)
"""Refusals that pass; so do all from 500 on."""


class ContextFull(ShoalError):
    """The conversation leaves no room for an answer."""


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    tokens: int
    """Drawn for it; 0 where a server does not say."""
    seconds: float


class Speaker(Protocol):
    """Answers conversations, several at a time."""

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        """The next thing said.

        Raises:
            ContextFull: there is no room for it.
            NetworkError, ModelError: there will be no answer now.
            ConfigError: there will never be one.
        """
        ...


@dataclass(frozen=True)
class EngineSpeaker:
    """An engine of this process."""

    engine: LocalEngine
    max_tokens: int
    temperature: float

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        started = time.monotonic()
        ids = tuple(self.engine.tokenizer.prompt(messages))
        room = min(self.max_tokens, self.engine.context_tokens - len(ids))
        if room < 1:
            raise ContextFull(
                f"a conversation of {len(ids)} tokens fills the context of {self.engine.context_tokens}.",
                "Raise --context-tokens, or take a model with a longer context.",
            )
        params = SamplingParams(max_tokens=room, temperature=self.temperature, seed=seed)
        done = await self.engine.sample(SampleRequest(prompt_ids=ids, params=params, grammar=grammar))
        if done.finish != "stop" and done.finish != "length":
            raise ModelError(f"sampling ended with '{done.finish}'.")
        return Reply(done.text, done.finish, len(ids), len(done.token_ids), time.monotonic() - started)


class _Said(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Said
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Answer(msgspec.Struct):
    """The parts of a chat completion that are read; servers add others."""

    choices: list[_Choice]
    usage: _Usage | None = None


def _checked(url: str) -> str:
    """A server's URL without its last slash; raises `ConfigError` for what is none."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url[:200]!r} is no address: {error}.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url[:200]!r} is no address of a server.", "Give it as http://127.0.0.1:8000/v1.")
    if parsed.userinfo:
        raise ConfigError("a server's URL is written down, so it may hold no password.", "Use --api-key-env.")
    return url.rstrip("/")


def served_model(url: str, key: str) -> str:
    """The name of the one model that a server serves.

    Raises:
        ConfigError: it serves several, none, or is no such server.
        NetworkError: it does not answer.
    """
    address = f"{_checked(url)}/models"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(address, headers=headers, timeout=CONNECT_S)
        names = [model.id for model in msgspec.json.decode(answer.content, type=_Models).data]
    except httpx.TransportError as error:
        raise NetworkError(f"{address} does not answer: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(
            f"{address} answered with {answer.status_code} and no list of models.",
            "Give the server's URL up to and with /v1, and its key with --api-key-env.",
        ) from None
    if len(names) != 1:
        raise ConfigError(
            f"{url} serves {', '.join(names[:20]) or 'no model'}.", "Name one: --endpoint URL --model NAME."
        )
    return names[0]


class EndpointSpeaker:
    """A server with OpenAI's chat API: `shoal serve`, or any other.

    Args:
        url: up to and with `/v1`.
        model: its name there.
        key: sent as bearer token; empty for none.
    """

    def __init__(self, url: str, model: str, key: str, *, max_tokens: int, temperature: float) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = f"{_checked(url)}/chat/completions"
        self._model, self._max_tokens, self._temperature = model, max_tokens, temperature
        self._limit = "max_tokens"
        """What the server calls the limit."""
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))

    async def __aenter__(self) -> EndpointSpeaker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def reply(self, messages: Sequence[Message], *, seed: int, grammar: Grammar | None = None) -> Reply:
        started = time.monotonic()
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            self._limit: self._max_tokens,
            "temperature": self._temperature,
            "seed": seed % 2**31,
        }
        if grammar is not None:
            # Only Shoal's own server knows it; another one refuses, which says so.
            body["response_format"] = {"type": "lark", "lark": grammar.text}
        try:
            content = await self._asked(msgspec.json.encode(body))
        except ConfigError as error:
            # Newer models of some servers know the limit by this name only.
            if self._limit == NEW_LIMIT or NEW_LIMIT not in error.problem:
                raise
            self._limit = NEW_LIMIT
            return await self.reply(messages, seed=seed, grammar=grammar)
        try:
            answer = msgspec.json.decode(content, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NetworkError(f"{self._url} answered with something that is no chat completion: {error}.") from None
        if not answer.choices:
            raise NetworkError(f"{self._url} answered with no choice.")
        usage = answer.usage or _Usage()
        choice = answer.choices[0]
        return Reply(
            choice.message.content or "",
            "length" if choice.finish_reason == "length" else "stop",
            usage.prompt_tokens,
            usage.completion_tokens,
            time.monotonic() - started,
        )

    async def _asked(self, body: bytes) -> bytes:
        """The answer's bytes, after as many attempts as it takes."""
        wait_s, why = FIRST_WAIT_S, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            try:
                async with asyncio.timeout(ANSWER_S):
                    status, content, asked_s = await self._post(body)
            except (httpx.TransportError, TimeoutError) as error:
                why = str(error) or type(error).__name__
                continue
            if status == 200:
                return content
            why = f"{status} {content[:MAX_SAID_CHARS].decode(errors='replace')}"
            if status not in BUSY and status < 500:
                self._refuse(status, content)
            wait_s = max(wait_s, min(asked_s, LONGEST_WAIT_S))
        raise NetworkError(f"{self._url} did not answer in {ATTEMPTS} attempts: {why}.")

    async def _post(self, body: bytes) -> tuple[int, bytes, float]:
        """Status, content, and how long the server wants to be left alone."""
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", self._url, content=body, headers=headers) as answer:
            content = bytearray()
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise NetworkError(f"{self._url} answered with more than {MAX_ANSWER_BYTES >> 20} MiB.")
            after = answer.headers.get("retry-after", "")
            return answer.status_code, bytes(content), float(after) if after.isdecimal() else 0.0

    def _refuse(self, status: int, content: bytes) -> None:
        said = " ".join(content[:4_000].decode(errors="replace").split())
        if "context_length" in said or "context length" in said or "maximum context" in said:
            raise ContextFull(f"{self._url} has no room for the conversation: {said[:MAX_SAID_CHARS]}.")
        if status in (401, 403):
            raise ConfigError(
                f"{self._url} refuses the key: {said[:MAX_SAID_CHARS]}.", "Name its variable with --api-key-env."
            )
        raise ConfigError(f"{self._url} refuses with {status}: {said[:MAX_SAID_CHARS]}.")
