"""A node that passes chunks on over direct links: those it has at once, those it is still waiting for as they come.

    WANT a b c ──▶ [a is here: ready] ─────────────────────▶ CHUNK a
                   [b, c: waiting] ◀── arrived(b) from a fetch ──▶ CHUNK b

So a chunk goes on as soon as it is verified, not when the snapshot is whole (cut-through per chunk).

Invariants: only what the store gives out, verified, is sent; wanted hashes a link may leave waiting, links a key may
hold, and links in all are bounded; whether a key may have chunks is asked at every `WANT`; whoever waits for chunks
hears an `ALIVE` now and then, and a link that wants nothing is silent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from msgspec.structs import replace

from shoal.broadcast.link import (
    READ_BUFFER_BYTES,
    Address,
    Kind,
    Link,
    digests_of,
    listener_context,
    welcome,
)
from shoal.broadcast.store import Store
from shoal.broadcast.turns import Turns
from shoal.broadcast.uplink import INTERVAL_S, UplinkMeter
from shoal.errors import NetworkError, ShoalError
from shoal.fabric.endpoint import is_loopback, reachable_addresses, resolve
from shoal.fabric.identity import Identity, node_id_of
from shoal.protocol.snapshot import PeerRecord

log = logging.getLogger("shoal.broadcast")

ALIVE_S = 0.5
"""A link that waits for chunks hears this often that somebody is there."""

MAX_WANTED = 2**17
"""Chunks that one link may want at once: 16 GiB of them."""

MAX_FRESH_BYTES = 16 * 2**20
"""Chunks kept in memory after they came."""

MAX_SENDING = 4
"""Links that send at a time (`turns`); several, because one alone does not fill a long way."""

MAX_LINKS = 512
MAX_LINKS_PER_KEY = 4


class Relay:
    """Serves a store over links until closed.

    Args:
        allow: takes a dialler's public key; the links of keys it rejects are closed.
    """

    def __init__(self, identity: Identity, store: Store, *, allow: Callable[[bytes], bool] | None = None) -> None:
        self._identity = identity
        self._store = store
        self._allow = allow
        self._server: asyncio.Server | None = None
        self._links: dict[_Serving, asyncio.Task[None]] = {}
        self._waiting: dict[bytes, set[_Serving]] = {}
        self._fresh: OrderedDict[bytes, bytes] = OrderedDict()
        """Chunks that came last."""
        self._fresh_bytes = 0
        self.turns = Turns(MAX_SENDING)
        """A link has one while a chunk leaves, first whoever has had the smallest part of what it wants."""
        self._uplink = UplinkMeter()
        self._measuring: asyncio.Task[None] | None = None
        self.bytes_sent: Counter[str] = Counter()
        """By node id of who took them."""
        self.refused = 0
        """Diallers turned away."""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> Address:
        """Listen; gives the address, whose host is the one that was bound.

        Raises:
            NetworkError: the address is not this machine's, or the port is taken.
        """
        context = None if is_loopback(host) else await asyncio.to_thread(listener_context, self._identity)
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, ssl=context, backlog=MAX_LINKS, limit=READ_BUFFER_BYTES
            )
        except OSError as error:
            raise NetworkError(
                f"cannot listen for links on {host}:{port}: {error.strerror or error}.", "Choose another port."
            ) from error
        self._measuring = asyncio.create_task(self._measure())
        bound = self._server.sockets[0].getsockname()[1]
        return Address(host, bound, self._identity.public_key)

    def arrived(self, digest: bytes, data: bytes) -> None:
        """A chunk, verified, has entered the store: send it to those who wait for it."""
        if digest not in self._fresh:
            self._fresh[digest] = data
            self._fresh_bytes += len(data)
        while self._fresh_bytes > MAX_FRESH_BYTES:
            self._fresh_bytes -= len(self._fresh.popitem(last=False)[1])
        for serving in self._waiting.pop(digest, ()):
            serving.arrived(digest)

    async def close(self) -> None:
        """Stop listening and end all links."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._links.values())
        if self._measuring is not None:
            tasks.append(self._measuring)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def describe(self, record: PeerRecord) -> PeerRecord:
        """The record with what this node's uplink was measured to carry, if it was."""
        measured = self._uplink.bytes_per_s
        return replace(record, up_bytes_per_s=measured) if measured > 0 else record

    async def _measure(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(INTERVAL_S)
            counts = {s.number: s.link.counts() for s in self._links if s.link is not None}
            self._uplink.sample({number: one for number, one in counts.items() if one is not None}, clock())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._links) >= MAX_LINKS:
            self.refused += 1
            writer.transport.abort()
            return
        serving = _Serving(self)
        task = asyncio.current_task()
        assert task is not None
        self._links[serving] = task
        try:
            await serving.run(await welcome(self._identity, reader, writer, self._admit))
        except ShoalError as error:
            self.refused += serving.link is None
            log.debug("a link ended: %s", error.problem)
        except asyncio.CancelledError:
            pass  # `close` ends links so, and the stream's own callback would report it as a failure
        finally:
            del self._links[serving]
            serving.forget()
            writer.transport.abort()

    def _admit(self, key: bytes) -> bool:
        num_links = sum(serving.link is not None and serving.link.peer == key for serving in self._links)
        return num_links < MAX_LINKS_PER_KEY and self.allows(key)

    def allows(self, key: bytes) -> bool:
        """Whether the node with this key may still have chunks; a link outlives a grant."""
        return self._allow is None or self._allow(key)

    def has(self, digest: bytes) -> bool:
        """Whether the chunk is in the store."""
        return self._store.has(digest)

    async def chunk(self, digest: bytes) -> bytes | None:
        """The chunk, verified; what has just come is still in memory, as all want it at once."""
        fresh = self._fresh.get(digest)
        return fresh if fresh is not None else await asyncio.to_thread(self._store.get_chunk, digest)

    def wait_for(self, digest: bytes, serving: _Serving) -> None:
        """Tell `serving` when the chunk arrives."""
        self._waiting.setdefault(digest, set()).add(serving)

    def forget(self, digest: bytes, serving: _Serving) -> None:
        """Undo `wait_for`."""
        waiting = self._waiting.get(digest)
        if waiting is not None:
            waiting.discard(serving)
            if not waiting:
                del self._waiting[digest]


@asynccontextmanager
async def relaying(
    identity: Identity, store: Store, host: str, *, allow: Callable[[bytes], bool] | None = None
) -> AsyncIterator[tuple[Relay, PeerRecord]]:
    """A relay that listens on `host` while inside, and the record with which others find it.

    Raises:
        NetworkError: it cannot listen there.
    """
    relay = Relay(identity, store, allow=allow)
    bound = await asyncio.to_thread(resolve, host)
    try:
        address = await relay.start(bound)
        yield relay, PeerRecord(host=reachable_addresses(bound)[0], port=address.port)
    finally:
        await relay.close()


_numbers = itertools.count()


class _Serving:
    """One link's wants."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.link: Link | None = None
        self.number = next(_numbers)
        self._num_sent = 0
        """Chunks, since nothing was wanted last."""
        self._wanted: set[bytes] = set()
        self._ready: deque[bytes] = deque()
        self._changed = asyncio.Event()

    async def run(self, link: Link) -> None:
        """Serve until the link ends."""
        self.link = link
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(link))
                group.create_task(self._send(link))
                group.create_task(self._show_life(link))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def arrived(self, digest: bytes) -> None:
        """A chunk that was waited for is in the store."""
        self._ready.append(digest)
        self._changed.set()

    def forget(self) -> None:
        """Wait for nothing any more."""
        for digest in self._wanted:
            self._relay.forget(digest, self)
        self._wanted.clear()

    async def _listen(self, link: Link) -> None:
        while True:
            kind, frame = await link.receive()
            match kind:
                case Kind.WANT:
                    if not self._relay.allows(link.peer):
                        raise NetworkError("a dialler is no longer admitted.")
                    for digest in digests_of(frame):
                        self._want(digest)
                case Kind.DROP:
                    for digest in digests_of(frame):
                        self._wanted.discard(digest)
                        self._relay.forget(digest, self)
                case _:
                    raise NetworkError(f"a dialler sent a frame of kind {kind.name}.")

    def _want(self, digest: bytes) -> None:
        # What is dropped, or wanted again, is still in the queue.
        if max(len(self._wanted), len(self._ready)) >= MAX_WANTED:
            raise NetworkError("a dialler wants too many chunks at once.")
        if not self._wanted:
            self._num_sent = 0
        self._wanted.add(digest)
        if self._relay.has(digest):
            self.arrived(digest)
        else:
            self._relay.wait_for(digest, self)

    async def _send(self, link: Link) -> None:
        while True:
            while self._ready:
                digest = self._ready.popleft()
                if digest not in self._wanted:
                    continue
                data = await self._relay.chunk(digest)
                if data is None:  # Pruned or damaged meanwhile: it may come again.
                    self._relay.wait_for(digest, self)
                    continue
                rank = self._num_sent / (self._num_sent + len(self._wanted))
                await link.send_in_turn(self._relay.turns.turn(rank), Kind.CHUNK, digest, data)
                self._wanted.discard(digest)
                self._num_sent += 1
                self._relay.bytes_sent[node_id_of(link.peer)] += len(data)
            self._changed.clear()
            await self._changed.wait()

    async def _show_life(self, link: Link) -> None:
        """Also while a chunk waits for its turn, or has not come."""
        while True:
            await asyncio.sleep(ALIVE_S)
            if self._wanted:
                link.show_life()
