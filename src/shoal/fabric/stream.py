"""Ordered byte frames from one node to another, no faster than the reader takes them.

Each frame is a signed request, answered when the reader has taken it: the answer is the credit. So at most `window`
frames are under way or waiting, a stream keeps its order over links that do not, and a frame counts as delivered
only when it was. Streams run one way; two make a conversation.

    await out.send(frame) ──▶ [≤ window unanswered] ──▶ [reorder, ≤ window] ──▶ async for frame in incoming

Invariants: the reader sees every frame once, in order, until the end or an error; a writer learns of a reader that
is gone or stands still for `stall_s`, a reader of a writer that is silent for `SILENCE_S` (an idle writer pings);
the memory of a stream is bounded by its window, that of a service by its number of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from shoal.errors import NetworkError, RecordError, ShoalError
from shoal.fabric.call import ABSENT_GRACE_S, call
from shoal.fabric.core import Core, log
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.fabric.waits import waiting

WINDOW = 8
"""Frames a writer has under way at once, unless it asks for another number."""

MAX_WINDOW = 16
"""Frames of one stream that a reader keeps for later, whatever the writer's window."""

MAX_STREAMS = 8
"""Streams of one name that a node accepts at once, unless it says otherwise."""

MAX_ENDED = 4096
"""Ended streams remembered, so that their stragglers do not open them anew."""

PING_S = 1.0
SILENCE_S = 6.0
"""A writer not heard of for this long is gone: several pings were lost."""

STALL_S = 60.0

FRAME_HEADER = struct.Struct(">16sBQ")
"""Stream id, kind, sequence number."""
DATA, END, PING, ABORT = range(4)

MAX_FRAME_BYTES = 4 * 2**20


class StreamBroken(NetworkError):
    """A stream ended before its end: the other side is gone, stands still, or gave up."""


def stream_key(node_id: str, name: str) -> str:
    """Where the node with this id takes frames of streams called `name`."""
    return f"node/{node_id}/stream/{name}"


class OutStream:
    """The writing end. Made by `Fabric.open_stream`; as a context manager it finishes, or aborts on an error."""

    def __init__(self, core: Core, to: bytes, name: str, window: int, stall_s: float) -> None:
        assert 1 <= window <= MAX_WINDOW
        self._core = core
        self._to = to
        self._key = stream_key(node_id_of(to), name)
        self._id = secrets.token_bytes(16)
        self._stall_s = stall_s
        self._slots = asyncio.Semaphore(window)
        self._next = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self._failure: NetworkError | None = None
        self._pinger = asyncio.create_task(self._ping())

    async def send(self, frame: bytes) -> None:
        """Hand over one frame; waits while the window is full.

        Raises:
            StreamBroken: the reader is gone, stands still or gave up. Which frames it took is then unknown.
        """
        assert len(frame) <= MAX_FRAME_BYTES
        await self._send(DATA, frame)

    async def finish(self) -> None:
        """Say that this was all and wait until the reader has taken it.

        Raises:
            StreamBroken: as `send`.
        """
        try:
            await self._send(END, b"")
            with waiting("a stream's reader to take the last frames", whom=self._to, deadline_s=self._stall_s):
                while self._under_way:
                    await asyncio.wait(self._under_way)
            self._raise_failure()
        finally:
            await self.close()

    async def abort(self) -> None:
        """Give up; the reader gets an error. Does not wait for it to hear of it longer than a ping."""
        await self.close()
        with contextlib.suppress(NetworkError):
            await self._ask(ABORT, 0, b"", PING_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.finish()
        else:
            await self.abort()

    async def _send(self, kind: int, frame: bytes) -> None:
        with waiting("a stream's reader to take a frame", whom=self._to, deadline_s=self._stall_s):
            await self._slots.acquire()
        if self._failure is not None:
            self._slots.release()
            self._raise_failure()
        task = asyncio.create_task(self._deliver(kind, self._next, frame))
        self._next += 1
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _deliver(self, kind: int, number: int, frame: bytes) -> None:
        try:
            await self._ask(kind, number, frame, self._stall_s)
        except NetworkError as error:
            self._failure = self._failure or error
        finally:
            self._slots.release()

    async def _ping(self) -> None:
        while self._failure is None:
            await asyncio.sleep(PING_S)
            try:
                await self._ask(PING, 0, b"", SILENCE_S)
            except NetworkError as error:
                self._failure = self._failure or error
        for task in self._under_way:
            task.cancel()  # Their answers will not come; whoever waits in `send` or `finish` is told now.

    async def _ask(self, kind: int, number: int, frame: bytes, deadline_s: float) -> None:
        body = FRAME_HEADER.pack(self._id, kind, number) + frame
        await call(
            self._core,
            self._key,
            body,
            deadline_s,
            to=self._to,
            max_reply_bytes=0,
            absent_grace_s=ABSENT_GRACE_S,
        )

    async def close(self) -> None:
        """Stop without a word; the reader finds out by the silence. `finish` and `abort` are kinder."""
        tasks = [self._pinger, *self._under_way]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StreamBroken(f"a stream broke: {self._failure.problem}", self._failure.remedy) from self._failure


class InStream:
    """The reading end: `async for frame in incoming`, in the handler given to `Fabric.accept_streams`."""

    def __init__(self, sender_key: bytes) -> None:
        self.sender = node_id_of(sender_key)
        self.sender_key = sender_key
        self._next = 0
        self._waiting: dict[int, tuple[int, bytes, asyncio.Future[None]]] = {}
        self._changed = asyncio.Event()
        self._heard_at = asyncio.get_running_loop().time()
        self._failure: StreamBroken | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next frame.

        Raises:
            StreamBroken: the writer is gone or gave up.
        """
        loop = asyncio.get_running_loop()
        while self._failure is None:
            if self._ended:
                raise StopAsyncIteration
            if self._next in self._waiting:
                kind, frame, taken = self._waiting.pop(self._next)
                self._next += 1
                if not taken.done():
                    taken.set_result(None)
                if kind == DATA:
                    return frame
                self._ended = True
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout_at(self._heard_at + SILENCE_S):
                    await self._changed.wait()
            except TimeoutError:
                if loop.time() - self._heard_at >= SILENCE_S:
                    self.fail(f"its writer, node {self.sender}, was silent for {SILENCE_S:g} s.")
        raise self._failure

    async def take(self, kind: int, number: int, frame: bytes) -> None:
        """Called for each request of this stream: returns when the reader has taken the frame."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        self._changed.set()
        if self._failure is not None:
            raise self._failure
        if kind == PING:
            return
        if kind == ABORT:
            self.fail("its writer gave up.")
            return
        if self._ended or number in self._waiting or not self._next <= number < self._next + MAX_WINDOW:
            raise RecordError("a stream's frame is out of its window.")
        taken: asyncio.Future[None] = loop.create_future()
        self._waiting[number] = (kind, frame, taken)
        await taken

    def fail(self, reason: str) -> None:
        """Break the stream for its reader and for the writer's frames that still wait."""
        if self._failure is not None:
            return
        self._failure = StreamBroken(reason)
        for _, _, taken in self._waiting.values():
            if not taken.done():
                taken.set_exception(self._failure)
                taken.exception()  # Its asker may be gone; then nobody else looks at it.
        self._waiting.clear()
        self._changed.set()


StreamHandler = Callable[[InStream], Awaitable[None]]


class StreamAcceptor:
    """Turns requests into streams and runs a handler for each. Made by `Fabric.accept_streams`."""

    def __init__(self, core: Core, handler: StreamHandler, max_streams: int) -> None:
        self._core = core
        self._handler = handler
        self._max_streams = max_streams
        self._streams: dict[bytes, InStream] = {}
        self._ended: dict[bytes, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def receive(self, request: Request) -> bytes:
        """The service's handler: one frame."""
        if len(request.body) < FRAME_HEADER.size:
            raise RecordError("a stream's frame lacks its header.")
        stream_id, kind, number = FRAME_HEADER.unpack_from(request.body)
        if kind not in (DATA, END, PING, ABORT):
            raise RecordError("a stream's frame is of an unknown kind.")
        name = request.sender_key + stream_id
        stream = self._streams.get(name)
        if stream is None:
            if name in self._ended or number >= MAX_WINDOW:
                raise StreamBroken("its reader ended.")
            if kind in (PING, ABORT):
                return b""  # Nothing was sent yet.
            if len(self._streams) >= self._max_streams:
                raise StreamBroken(f"its reader has {self._max_streams} streams open already.", "Try again later.")
            stream = self._streams[name] = InStream(request.sender_key)
            task = asyncio.create_task(self._run(name, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await stream.take(kind, number, request.body[FRAME_HEADER.size :])
        return b""

    async def close(self) -> None:
        """End all streams and their handlers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, name: bytes, stream: InStream) -> None:
        try:
            await self._handler(stream)
        except ShoalError as error:
            self._core.counters["stream_failed"] += 1
            log.info("a stream from node %s failed: %s", stream.sender, error)
        except Exception:  # noqa: BLE001  One faulty handler must not end the service for all; logged and counted.
            self._core.counters["stream_failed"] += 1
            log.exception("the handler of a stream from node %s failed", stream.sender)
        finally:
            stream.fail("its reader ended.")
            del self._streams[name]
            self._ended[name] = None
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
