"""What the parts of one fabric share: its links, the identity, the loop, and a pool for calls that may block.

Invariant: nothing else in this room holds a thread. Zenoh calls its callbacks on threads of its own; they may do no
more than count and `post` to the loop. Calls into Zenoh that can wait for a slow link go through `blocking`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zenoh
from blake3 import blake3

from shoal.fabric.envelope import (
    Envelope,
    Header,
    Kind,
    ReplayGuard,
    Seal,
    check_envelope,
    open_body,
    write_envelope,
)
from shoal.fabric.hello import KnownKeys
from shoal.fabric.identity import Identity
from shoal.fabric.links import Links
from shoal.fabric.sealing import SealingKey

T = TypeVar("T")

log = logging.getLogger("shoal.fabric")

CONCRETE_KEY = re.compile(r"[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*")
KEY_PATTERN = re.compile(r"(\*{1,2}|[A-Za-z0-9_.=-]+)(/(\*{1,2}|[A-Za-z0-9_.=-]+))*")

MAX_BODY_BYTES = 80 * 2**20
"""No larger body is sent: the largest record (64 MiB) with room to spare."""

MAX_MESSAGE_BYTES = MAX_BODY_BYTES + 64 * 1024
"""No larger message is assembled from a peer: a body, its envelope and what Zenoh adds."""

HASH_OFF_LOOP_BYTES = 256 * 1024
"""Bodies larger than this are hashed in the pool: below it the hand-over costs more than the hash."""

SEND_THREADS = 64
"""Each waits on one slow link at a time; they cost nothing while they wait."""

LANE_WIDTH = 8
"""Threads that one destination may hold, so that a peer which takes nothing cannot hold up what others are sent."""


class Lane:
    """The sends to one destination: how many are there, and the slots they share."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(LANE_WIDTH)
        self.num_users = 0


@dataclass
class Core:
    """One node's open connections and what hangs on them."""

    identity: Identity
    namespace: str
    """Of the run: nodes of runs that share a router do not hear each other."""
    loop: asyncio.AbstractEventLoop
    sealing: SealingKey = field(default_factory=SealingKey.generate)
    known: KnownKeys = field(default_factory=KnownKeys)
    guard: ReplayGuard = field(default_factory=ReplayGuard)
    counters: Counter[str] = field(default_factory=Counter)
    """What went wrong and was survived, by name; read by metrics and tests, changed on the loop only."""
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(SEND_THREADS, thread_name_prefix="shoal-fabric")
    )
    lanes: dict[bytes, Lane] = field(default_factory=dict)
    """By destination; a lane lasts as long as somebody sends in it."""
    links: Links = field(init=False)
    closed: bool = False

    def __post_init__(self) -> None:
        self.links = Links(self.blocking)

    def full_key(self, key: str, pattern: re.Pattern[str] = CONCRETE_KEY) -> str:
        """The key as Zenoh routes it. One that our own code misspells is a defect, not a user's mistake."""
        assert pattern.fullmatch(key), f"{key!r} is no key"
        return self.namespace + key

    def local_key(self, zenoh_key: object) -> str:
        """The key as this room's users write it."""
        return str(zenoh_key).removeprefix(self.namespace)

    async def blocking(self, call: Callable[..., T], *args: Any) -> T:
        """Run a call that may block in the pool."""
        return await self.loop.run_in_executor(self.pool, call, *args)

    async def send(self, destination: bytes, call: Callable[..., T], *args: Any) -> T:
        """`blocking`, for calls that wait while the link to `destination` (a public key or a key) takes nothing."""
        lane = self.lanes.setdefault(destination, Lane())
        lane.num_users += 1
        try:
            async with lane.slots:
                return await self.blocking(call, *args)
        finally:
            lane.num_users -= 1
            if lane.num_users == 0:
                del self.lanes[destination]

    def detach(self, call: Callable[..., object], *args: Any) -> None:
        """Run a call that may block in the pool and forget about it; after `close` there is nothing left to call."""
        with contextlib.suppress(RuntimeError):
            self.pool.submit(call, *args)

    def post(self, call: Callable[..., object], *args: Any) -> bool:
        """From any thread: run `call` on the loop soon; False if the loop is gone."""
        try:
            self.loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True

    async def write(
        self,
        kind: Kind,
        key: str,
        body: bytes,
        *,
        to: bytes = b"",
        answers: bytes = b"",
        deadline_s: float = 0.0,
        reader: bytes = b"",
    ) -> Envelope:
        """A signed envelope, sealed to the sealing key `reader` if there is one; large bodies off the loop."""
        seal = Seal(self.sealing, reader) if reader else None

        def run() -> Envelope:
            return write_envelope(
                self.identity,
                kind,
                key,
                body,
                now=time.time(),
                to=to,
                answers=answers,
                deadline_s=deadline_s,
                seal=seal,
            )

        return await self.blocking(run) if len(body) > HASH_OFF_LOOP_BYTES else run()

    async def check(self, header: Header, attachment: bytes, body: bytes, kinds: tuple[Kind, ...], key: str) -> None:
        """`check_envelope`, large bodies hashed off the loop."""

        def run() -> None:
            check_envelope(header, attachment, body, kinds=kinds, key=key)

        if len(body) > HASH_OFF_LOOP_BYTES:
            await self.blocking(run)
        else:
            run()

    async def open(self, header: Header, attachment: bytes, body: bytes) -> bytes:
        """`open_body` of an envelope that was checked; the sender's sealing key is kept where none was known."""

        def run() -> bytes:
            return open_body(header, attachment, body, self.sealing)

        plaintext = await self.blocking(run) if len(body) > HASH_OFF_LOOP_BYTES else run()
        if header.sealed_by and self.known.get(header.sender) is None:
            # Not in place of a known one: a run's owner has the coordinator's identity in two processes.
            self.known.learn(header.sender, header.sealed_by)
        return plaintext


def namespace_of(coordinator_key: bytes) -> str:
    """What every key of one run begins with, on the wire.

    Zenoh's own `namespace` setting does the same, but a link that takes nothing then holds up all others (measured
    with 1.10.2: a request past a stopped peer waits until that is given up).
    """
    return f"shoal/{blake3(b'shoal namespace' + coordinator_key).hexdigest()[:32]}/"


def read_bytes(payload: zenoh.ZBytes | None) -> bytes:
    """The payload's bytes; an absent one is empty."""
    return b"" if payload is None else payload.to_bytes()
