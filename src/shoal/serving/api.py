"""What every endpoint needs: the engine, who it is, what it takes, and the ways to answer.

Invariants: a request is inside the gate from before its first token to after its last; a request whose client has gone
is cancelled; nothing takes longer than `request_timeout_s`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shoal.config import Serving
from shoal.engine.embedding import Embedder
from shoal.engine.grammar import Constraint
from shoal.engine.shaping import PLAIN, Shaping
from shoal.errors import ConfigError, ModelError
from shoal.protocol.sampling import Grammar, SamplingParams
from shoal.serving.backend import Engine
from shoal.serving.dialect import Dialect
from shoal.serving.errors import ApiError, bad_request
from shoal.serving.events import EventStream, gone
from shoal.serving.gate import Gate
from shoal.serving.generation import MAX_SEED, Job, check
from shoal.serving.metrics import Metrics
from shoal.serving.notes import Notes
from shoal.serving.schema import GrammarFormat, JsonFormat, RegexFormat, ResponseFormat, Sampling, SchemaFormat

BODY_TIMEOUT_S = 20.0
"""A body must arrive within this time, plus what its size takes at `SLOWEST_BYTES_PER_S`."""

SLOWEST_BYTES_PER_S = 16_384

DEFAULT_MAX_TOKENS = 1024
"""Where a request names no limit. The engine reserves memory for all the tokens that may come."""

T = TypeVar("T")


@dataclass
class Api:
    """One model, served."""

    engine: Engine
    model: str
    """The name that clients give."""
    settings: Serving
    adapters: tuple[str, ...] = ()
    """Names that the engine takes; clients say `MODEL:NAME`."""
    embedder: Embedder | None = None
    embedding_model: str = ""
    """The name that clients give, where there is an embedder."""
    notes: Notes | None = None
    """What is remembered, where the settings name a folder."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.gate = Gate(self.settings.max_sequences + self.settings.max_waiting)
        self.metrics = Metrics(self.engine, self.gate)
        self.dialect = Dialect.of(self.engine.tokenizer.template)

    async def body(self, request: Request) -> bytes:
        """The request's body, within its limits of size and time."""
        most = self.settings.max_body_bytes
        if not request.headers.get("content-type", "application/json").startswith("application/json"):
            raise ApiError(415, "The body must be application/json.")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and len(declared) < 20 and int(declared) > most:
            raise ApiError(413, f"The body exceeds {most} bytes.", code="body_too_large")
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S + most / SLOWEST_BYTES_PER_S):
                async for chunk in request.stream():
                    found += chunk
                    if len(found) > most:
                        raise ApiError(413, f"The body exceeds {most} bytes.", code="body_too_large")
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.") from None
        return bytes(found)

    @property
    def models(self) -> list[str]:
        """All names that clients may give."""
        embedding = [self.embedding_model] if self.embedder else []
        return [self.model, *(f"{self.model}:{name}" for name in self.adapters), *embedding]

    @property
    def fingerprint(self) -> str:
        """What answers: the weights' version, and the acceptance rule where it may have changed what they say."""
        rule = self.engine.lossy_rule
        return f"v{self.engine.version}" + (f"-{rule}" if rule else "")

    def adapter_of(self, name: str) -> str:
        """The adapter that a model's name asks for, or none; refuses what does not draw tokens."""
        if name == self.model:
            return ""
        adapter = name.removeprefix(f"{self.model}:")
        if adapter == name or adapter not in self.adapters:
            raise unknown(name)
        return adapter

    def params(self, body: Sampling, max_tokens: int | None, prompt_tokens: int) -> SamplingParams:
        """The engine's parameters. Where no limit is named: what the context leaves, up to `DEFAULT_MAX_TOKENS`."""
        left = max(1, self.engine.context_tokens - prompt_tokens)
        return SamplingParams(
            max_tokens=max_tokens or min(left, DEFAULT_MAX_TOKENS),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            stop=body.stops,
            seed=None if body.seed is None else body.seed % MAX_SEED,
        )

    async def shaping(
        self,
        body: Sampling,
        num_top: int,
        lark: str | None = None,
        response_format: ResponseFormat | None = None,
        *,
        adapter: str = "",
    ) -> Callable[[], Shaping]:
        """How choices are shaped: penalties, biases, and a grammar if there is one, which is tried out first."""
        bias = _bias(body.logit_bias or {}, self.engine.tokenizer.vocab_size)
        plain = Shaping(None, bias, body.presence_penalty or 0.0, body.frequency_penalty or 0.0, num_top, adapter)
        made = self._constraint(lark, response_format)
        if made is None:
            return lambda: PLAIN if plain == PLAIN else plain
        try:
            await asyncio.to_thread(made)
        except (ConfigError, ModelError) as error:
            raise bad_request(str(error), "response_format" if lark is None else "tools") from None
        return lambda: replace(plain, constraint=made())

    def _constraint(self, lark: str | None, asked: ResponseFormat | None) -> Callable[[], Constraint] | None:
        grammar = asked_grammar(lark, asked)
        return None if grammar is None else lambda: self.engine.grammars.constraint(grammar)

    async def answer(self, request: Request, job: Job, work: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
        """A whole JSON answer, unless the client goes before it is there."""
        check(self.engine, job)
        return await self.answer_within(request, job.size, work)

    async def answer_within(
        self, request: Request, size: int, work: Callable[[], Awaitable[dict[str, Any]]]
    ) -> Response:
        """The same for work that takes as many of the gate's places."""
        with self.gate.enter(size, time.monotonic()) as stay:
            found = await self._while_listened(request, work())
            stay.end(time.monotonic())
        return json_response(found)

    def stream(self, job: Job, frames: AsyncGenerator[bytes]) -> Response:
        """A stream of events."""
        check(self.engine, job)
        stack = ExitStack()
        stay = stack.enter_context(self.gate.enter(job.size, time.monotonic()))
        stack.callback(lambda: stay.end(time.monotonic()))
        return EventStream(self._watched(frames), self.settings.request_timeout_s, stack)

    async def _watched(self, frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        started = time.monotonic()
        first = True
        async with aclosing(frames):
            async for data in frames:
                if first:
                    self.metrics.first_piece.observe(time.monotonic() - started)
                    first = False
                yield data

    async def _while_listened(self, request: Request, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait(
                {task, watch}, return_when=asyncio.FIRST_COMPLETED, timeout=self.settings.request_timeout_s
            )
            if task.done():
                return task.result()
            if watch.done():
                raise ClientDisconnect
            raise ApiError(504, "The request took too long.", code="timeout")
        finally:
            for one in (task, watch):
                one.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


def asked_grammar(lark: str | None, asked: ResponseFormat | None) -> Grammar | None:
    """What a completion must match: its tools' grammar, or the response format; None where it is free."""
    if lark is not None:
        return Grammar(kind="lark", text=lark)
    if isinstance(asked, JsonFormat):
        return Grammar(kind="json_schema", text='{"type": "object"}')
    if isinstance(asked, SchemaFormat):
        return Grammar(kind="json_schema", text=json.dumps(asked.json_schema.schema_ or {"type": "object"}))
    if isinstance(asked, RegexFormat):
        return Grammar(kind="regex", text=asked.regex)
    if isinstance(asked, GrammarFormat):
        return Grammar(kind="lark", text=asked.lark)
    return None


def unknown(name: str) -> ApiError:
    return ApiError(404, f"The model '{name}' is not served here.", code="model_not_found", param="model")


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _bias(asked: dict[str, float], vocab_size: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in asked.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= vocab_size:
            raise bad_request(f"'{key[:40]}' is no token id of this model.", "logit_bias")
        if not -100 <= value <= 100:
            raise bad_request(f"A bias of {value} is not between -100 and 100.", "logit_bias")
        found[int(key)] = value
    return found
