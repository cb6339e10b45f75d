"""Publications: one speaks, whoever listens hears, and nobody waits.

Invariants: a subscription holds at most `capacity` messages; when one more comes the oldest goes and is counted, so a
slow reader sees the newest state and knows how much it missed. A message reaches the reader once, however many links it
came by, and only if its envelope passed every check. Delivery is best effort: the network may lose a publication
under congestion; what must arrive is a request, or is asked for again by whoever hears a later announcement.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import zenoh

from shoal.fabric.core import KEY_PATTERN, Core, read_bytes
from shoal.fabric.envelope import ReplayGuard, read_header
from shoal.fabric.errors import EnvelopeError
from shoal.fabric.links import Link
from shoal.fabric.watch import Watch

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
    key = core.full_key(topic)
    envelope = await core.write("publication", topic, body)
    congestion = zenoh.CongestionControl.BLOCK if wait else zenoh.CongestionControl.DROP

    def send(link: Link) -> None:
        link.session.put(key, body, attachment=envelope.attachment, congestion_control=congestion)

    await asyncio.gather(*(core.send(f"{key} {link.name}".encode(), send, link) for link in core.links.up))


class Subscription(Watch[Message]):
    """Messages of a topic: `async with fabric.subscribe(topic) as stream: async for message in stream: …`."""

    def __init__(
        self, core: Core, topic: str, capacity: int, max_bytes: int, allow: Callable[[bytes], bool] | None
    ) -> None:
        super().__init__(core)
        self._key = core.full_key(topic, KEY_PATTERN)
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._allow = allow
        self._guard = ReplayGuard(capacity=MAX_TOPIC_NONCES)
        self._lock = threading.Lock()
        self._samples: deque[zenoh.Sample] = deque()
        self.dropped = 0
        """Messages pushed out because the reader was slow, or larger than allowed."""

    def _declare(self, link: Link) -> zenoh.Subscriber[None]:
        receive = zenoh.handlers.Callback(self._receive, indirect=False)
        return link.session.declare_subscriber(self._key, receive)

    async def _take(self) -> Message | None:
        while True:
            with self._lock:
                if not self._samples:
                    return None
                sample = self._samples.popleft()
            try:
                return await self._believe(sample)
            except EnvelopeError as error:
                # What comes by several links comes again by each; with one link it is somebody's trick.
                if error.kind != "replay" or len(self._core.links.up) < 2:
                    self._core.counters[f"publication_refused.{error.kind}"] += 1

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
            self._core.post(self._wake)

    async def _believe(self, sample: zenoh.Sample) -> Message:
        attachment = read_bytes(sample.attachment)
        header = read_header(attachment)
        if self._allow is not None and not self._allow(header.sender):
            raise EnvelopeError("stranger", f"node {header.node_id} has not been admitted.")
        topic = self._core.local_key(sample.key_expr)
        body = read_bytes(sample.payload)
        await self._core.check(header, attachment, body, ("publication",), topic)
        self._guard.admit(header, time.time())
        return Message(header.node_id, header.sender, topic, body, header.sent_at)
