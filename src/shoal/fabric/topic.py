"""Publications: one speaks, whoever listens hears, and nobody waits.

Invariants: a subscription holds at most `capacity` messages; when one more comes the oldest goes and is counted, so a
slow reader sees the newest state and knows how much it missed. A message reaches the reader only if its envelope
passed every check. Delivery is best effort: the network may lose a publication under congestion; what must arrive is
a request, or is asked for again by whoever hears a later announcement.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import zenoh

from shoal.fabric.core import KEY_PATTERN, Core, full_key, local_key, read_bytes
from shoal.fabric.envelope import ReplayGuard, read_header
from shoal.fabric.errors import EnvelopeError

MAX_TOPIC_NONCES = 1 << 14
"""Each subscription remembers its own nonces: two that overlap both get the message."""


class Message(NamedTuple):
    """One publication, its envelope checked."""

    sender: str
    """Node id."""
    sender_key: bytes
    topic: str
    body: bytes
    sent_at: float
    """Unix seconds on the sender's clock."""


async def publish(core: Core, topic: str, body: bytes, *, wait: bool) -> None:
    """Sign and send; see `Fabric.publish`."""
    key = full_key(topic)
    _, attachment = await core.seal("publication", topic, body)
    congestion = zenoh.CongestionControl.BLOCK if wait else zenoh.CongestionControl.DROP

    def send() -> None:
        core.session.put(key, body, attachment=attachment, congestion_control=congestion)

    await core.send(key.encode(), send)


class Subscription:
    """Messages of a topic: `async with fabric.subscribe(topic) as stream: async for message in stream: …`."""

    def __init__(
        self, core: Core, topic: str, capacity: int, max_bytes: int, allow: Callable[[bytes], bool] | None
    ) -> None:
        self._core = core
        self._key = full_key(topic, KEY_PATTERN)
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._allow = allow
        self._guard = ReplayGuard(capacity=MAX_TOPIC_NONCES)
        self._lock = threading.Lock()
        self._samples: deque[zenoh.Sample] = deque()
        self._arrived = asyncio.Event()
        self._subscriber: zenoh.Subscriber[None] | None = None
        self._closed = False
        self.dropped = 0
        """Messages pushed out because the reader was slow, or larger than allowed."""

    async def open(self) -> None:
        """Begin to listen."""
        receive = zenoh.handlers.Callback(self._receive, indirect=False)

        def declare() -> zenoh.Subscriber[None]:
            return self._core.session.declare_subscriber(self._key, receive)

        self._subscriber = await self._core.blocking(declare)

    async def close(self) -> None:
        """Stop listening; a reader's loop ends after the messages already here."""
        self._closed = True
        self._arrived.set()
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            await self._core.blocking(subscriber.undeclare)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while True:
            with self._lock:
                sample = self._samples.popleft() if self._samples else None
                if sample is None:
                    self._arrived.clear()
            if sample is not None:
                try:
                    return await self._believe(sample)
                except EnvelopeError as error:
                    self._core.counters[f"publication_refused.{error.kind}"] += 1
            elif self._closed:
                raise StopAsyncIteration
            else:
                await self._arrived.wait()

    def _receive(self, sample: zenoh.Sample) -> None:
        # On Zenoh's thread. The deque is bounded here, so that a loop that stands still costs no memory.
        with self._lock:
            if len(sample.payload) > self._max_bytes:
                self.dropped += 1
                return
            if len(self._samples) >= self._capacity:
                self._samples.popleft()
                self.dropped += 1
            self._samples.append(sample)
            wake = len(self._samples) == 1
        if wake:
            self._core.post(self._arrived.set)

    async def _believe(self, sample: zenoh.Sample) -> Message:
        attachment = read_bytes(sample.attachment)
        header = read_header(attachment)
        if self._allow is not None and not self._allow(header.sender):
            raise EnvelopeError("stranger", f"node {header.node_id} has not been admitted.")
        topic = local_key(sample.key_expr)
        body = read_bytes(sample.payload)
        await self._core.check(header, attachment, body, ("publication",), topic)
        self._guard.admit(header, time.time())
        return Message(header.node_id, header.sender, topic, body, header.sent_at)
