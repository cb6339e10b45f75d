"""Server-sent events, for as long as the client listens.

Invariants: when the client goes, or doesn't take an event for `WRITE_TIMEOUT_S`, what makes the events is closed at
once; an error after the first event is told as an event, because the status is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.serving.errors import ApiError

WRITE_TIMEOUT_S = 30.0
"""A client that takes nothing for this long is taken for gone."""

DONE = "[DONE]"

Event = dict[str, Any] | str


def frame(event: Event, name: str = "") -> bytes:
    """One event as bytes; `name` is its type, where it has one."""
    data = event.encode() if isinstance(event, str) else msgspec.json.encode(event)
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


class EventStream(Response):
    """A response that streams frames.

    Args:
        frames: encoded events (`frame`).
        timeout_s: the longest that the whole stream may take.
        owned: closed when the stream has ended, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes], timeout_s: float, owned: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._timeout_s = timeout_s
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._owned:
            await self._run(receive, send)

    async def _run(self, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            pump.cancel()
            await asyncio.gather(watch, pump, return_exceptions=True)
        if not pump.cancelled() and (error := pump.exception()) is not None:
            raise error

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._frames):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # The client has gone, or doesn't take what it asked for: nobody is left to tell.
            with suppress(OSError):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        async for data in self._frames:
                            await self._write(send, data)
                except TimeoutError:
                    await self._write(send, frame(ApiError(504, "The request took too long.", code="timeout").body))
                except ApiError as error:
                    await self._write(send, frame(error.body))
                await self._write(send, b"", more=False)

    @staticmethod
    async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ConnectionError("the client takes nothing") from None


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
