"""Runs over HTTP: routes for whoever serves them.

    POST /v1/runs                          {"task": "...", "tools": [...], "budget": {...}}  →  201, the run
    GET  /v1/runs                          the newest runs
    GET  /v1/runs/{run}                    where it stands
    GET  /v1/runs/{run}/events             server-sent events; Last-Event-ID goes on from there
    GET  /v1/runs/{run}/episode            one that was recorded, as an episode; ?reward=0.5 says what it was worth
    POST /v1/runs/{run}/cancel             end it
    POST /v1/runs/{run}/resume             go on with one that was interrupted
    POST /v1/runs/{run}/fork               {"seq": 12}  →  201, another run that begins with these events
    POST /v1/runs/{run}/approvals/{call}   {"allowed": true}

An event's frame is made of stored bytes alone: whoever reconnects, wherever the stream was cut, has in the end the same
bytes as somebody who was never cut off. Its `event` is our word, `type` in its data AG-UI's where that has one.

Invariants: bodies are bounded and typed; errors are JSON with one sentence; nothing here decides what a run may do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.agents.scheduler.episodes import episode_of
from shoal.agents.scheduler.log import Stored
from shoal.agents.scheduler.records import AG_UI_TYPES, RunRequest
from shoal.agents.scheduler.service import Runs
from shoal.errors import CapacityError, ConfigError, RecordError, RunError
from shoal.protocol.codec import to_json

T = TypeVar("T")

MAX_BODY_BYTES = 512 * 1024
BODY_TIMEOUT_S = 20.0
MAX_LISTED = 100

Streamed = Callable[[AsyncGenerator[bytes]], Response]
"""Makes a response of frames that ends when the client goes; whoever serves brings it."""


class Fork(msgspec.Struct, forbid_unknown_fields=True):
    """Where a fork begins."""

    seq: int


class Approval(msgspec.Struct, forbid_unknown_fields=True):
    """An answer to a call that waits for one."""

    allowed: bool
    by: str = "http"


def run_routes(runs: Runs, streamed: Streamed) -> list[Route]:
    """The routes of one log of runs."""

    async def create(request: Request) -> Response:
        try:
            run = runs.start(await _body(request, RunRequest))
        except (RecordError, ConfigError, RunError) as error:
            raise HTTPException(400, str(error).rstrip(".")) from None
        except CapacityError as error:
            raise HTTPException(429, str(error).rstrip(".")) from None
        return _json(runs.summary(run), 201)

    async def listed(_: Request) -> Response:
        return _json({"object": "list", "data": runs.newest(MAX_LISTED)})

    async def shown(request: Request) -> Response:
        return _json(runs.summary(_known(runs, request)))

    async def events(request: Request) -> Response:
        run = _known(runs, request)
        return streamed(_frames(runs, run, _after(request, run)))

    async def episode(request: Request) -> Response:
        run = _known(runs, request)
        try:
            reward = float(request.query_params.get("reward", "0"))
        except ValueError:
            reward = math.nan
        if not math.isfinite(reward):
            raise HTTPException(400, "the reward is no finite number")
        try:
            found = episode_of(list(runs.log.events(run)), reward)
        except RunError as error:
            raise HTTPException(409, str(error).rstrip(".")) from None
        return Response(to_json(found), media_type="application/json")

    async def cancel(request: Request) -> Response:
        run = _known(runs, request)
        if not runs.cancel(run):
            raise HTTPException(409, f"the run {run} is not being worked on here")
        return _json(runs.summary(run))

    async def resume(request: Request) -> Response:
        run = _known(runs, request)
        try:
            runs.resume(run)
        except CapacityError as error:
            raise HTTPException(429, str(error).rstrip(".")) from None
        return _json(runs.summary(run))

    async def fork(request: Request) -> Response:
        run = _known(runs, request)
        try:
            made = runs.fork(run, (await _body(request, Fork)).seq)
        except RunError as error:
            raise HTTPException(400, str(error).rstrip(".")) from None
        except CapacityError as error:
            raise HTTPException(429, str(error).rstrip(".")) from None
        return _json(runs.summary(made), 201)

    async def approve(request: Request) -> Response:
        run, call = _known(runs, request), request.path_params["call"]
        said = await _body(request, Approval)
        if not runs.approve(run, call, said.allowed, said.by[:100]):
            raise HTTPException(409, f"the call {call} does not wait for approval")
        return _json(runs.summary(run))

    def route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        return Route(path, endpoint, methods=[method])

    return [
        route("/v1/runs", create, "POST"),
        route("/v1/runs", listed, "GET"),
        route("/v1/runs/{run}", shown, "GET"),
        route("/v1/runs/{run}/events", events, "GET"),
        route("/v1/runs/{run}/episode", episode, "GET"),
        route("/v1/runs/{run}/cancel", cancel, "POST"),
        route("/v1/runs/{run}/resume", resume, "POST"),
        route("/v1/runs/{run}/fork", fork, "POST"),
        route("/v1/runs/{run}/approvals/{call}", approve, "POST"),
    ]


def frame(event: Stored) -> bytes:
    """One stored event as a server-sent event; the same bytes whenever it is asked for."""
    kind = AG_UI_TYPES.get(event.kind, "CUSTOM")
    head = f'id: {event.run}:{event.seq}\nevent: {event.kind}\ndata: {{"type":"{kind}","time":{event.time!r},"data":'
    return head.encode() + event.data + b"}\n\n"


async def _frames(runs: Runs, run: str, after: int) -> AsyncGenerator[bytes]:
    async for event in runs.follow(run, after):
        yield frame(event)


def _known(runs: Runs, request: Request) -> str:
    run: str = request.path_params["run"]
    if not runs.log.stored(run, 0, 1):
        raise HTTPException(404, f"there is no run {run[:64]!r}")
    return run


def _after(request: Request, run: str) -> int:
    """The number that a client names as the last it has."""
    last = request.headers.get("last-event-id", "")
    if not last:
        return 0
    of, _, number = last.rpartition(":")
    if of != run or not number.isascii() or not number.isdigit() or len(number) > 15:
        raise HTTPException(400, "Last-Event-ID is no event of this run")
    return int(number)


async def _body(request: Request, kind: type[T]) -> T:
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                found += chunk
                if len(found) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body exceeds {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time") from None
    try:
        return msgspec.json.decode(bytes(found), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not what it should be: {error}") from None


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
