"""Chunks from many nodes at once, each from whom the plan says, and from another where that one fails.

    plan.provider(chunk, me, gone) ─▶ a link to each provider ─ WANT ─▶ CHUNK, verified ─▶ store ─▶ own relay

Every node asks the relay of a chunk for it and a relay asks the source; the answer comes when the chunk does. What
can go wrong is repaired by asking somebody else, never by beginning again:

- a link that cannot be opened, ends, or is silent for `SILENCE_S`: its peer is gone, and the plan's stand-in is asked
- a wrong chunk, or one that nobody asked for: the peer is blamed and gone, for later versions too
- a peer that lives and sends nothing for `LATE_S` and some rounds: the stand-in is asked for its next chunks as well

Invariants: a chunk enters the store only after its hash was found right; a chunk is dropped from what is missing only
then; the gathering ends with nothing missing, or with an error after `GIVE_UP_S` without a single new chunk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from blake3 import blake3

from shoal.broadcast.link import Address, Kind, Link
from shoal.broadcast.pool import LinkPool
from shoal.broadcast.store import Store
from shoal.errors import NetworkError, ShoalError
from shoal.fabric.identity import node_id_of
from shoal.planning.dissemination import SOURCE, Plan

log = logging.getLogger("shoal.broadcast")

SILENCE_S = 2.5
"""A peer says that it is alive twice a second."""

LATE_S = 5.0
CYCLES = 2.0
"""So many times as long as a relay needs for one chunk to everybody is added to that."""

LATE_CHUNKS = 8
"""Asked of the stand-in at once, when a peer is late."""

GIVE_UP_S = 30.0
TICK_S = 0.25
REDIAL_S = 1.0
"""The source is dialled again after so long: it may have been busy, and nobody can stand in for it for ever."""


class Peers(NamedTuple):
    """A plan and where those in it listen, by their number in it."""

    plan: Plan
    name: str
    """This node's name in the plan."""
    addresses: Mapping[int, Address]
    """`SOURCE` included; those that cannot be connected to are left out."""


class Gathering:
    """Fetches one set of chunks.

    Args:
        links: to the others, open or to be opened.
        sizes: bytes of each chunk by its hash, in the order of the plan's chunks.
        wanted: those of them that this node is to have; by default all.
        on_chunk: told of each chunk, hash and bytes, when it is in the store.
        blame: counts wrong chunks by node id.
        received: counts bytes by the node id they came from.
    """

    def __init__(
        self,
        links: LinkPool,
        store: Store,
        sizes: Mapping[bytes, int],
        peers: Peers,
        on_chunk: Callable[[bytes, bytes], None],
        *,
        blame: Counter[str],
        received: Counter[str],
        wanted: Collection[bytes] | None = None,
    ) -> None:
        self.links = links
        self._store = store
        self._peers = peers
        self._on_chunk = on_chunk
        self._blame = blame
        self._received = received
        self._sizes = sizes
        self._places = {digest: place for place, digest in enumerate(sizes)}
        asked = sizes if wanted is None else [digest for digest in sizes if digest in wanted]
        self._missing = dict.fromkeys(digest for digest in asked if not store.has(digest))
        self._gone: set[int] = {i for i in range(len(peers.plan.receivers)) if self._is_useless(i)}
        self._providers: dict[int, _Provider] = {}
        self._done = asyncio.Event()
        self._failure: ShoalError | None = None
        self._progress_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Return when nothing is missing.

        Raises:
            NetworkError: nothing came for `GIVE_UP_S`.
            StorageError: this node's disk is full or faulty.
        """
        try:
            self._assign(self._missing)
            while self._missing:
                if self._failure is not None:
                    raise self._failure
                self._done.clear()
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._done.wait()
                except TimeoutError:
                    self._look_round(asyncio.get_running_loop().time())
        finally:
            tasks = [provider.task for provider in self._providers.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_useless(self, number: int) -> bool:
        """Whether a peer cannot be connected to, or has sent wrong chunks before."""
        address = self._peers.addresses.get(number)
        return address is None or self._blame[node_id_of(address.public_key)] > 0

    def _assign(self, digests: Iterable[bytes], *, late: int | None = None) -> None:
        """Ask for chunks; `late` is a provider not to ask, though it lives."""
        wanted: dict[int, list[bytes]] = {}
        avoided = self._gone if late is None else self._gone | {late}
        for digest in digests:
            number = self._peers.plan.provider(self._places[digest], self._peers.name, avoided)
            if number == SOURCE and SOURCE in avoided:
                number = self._any_but(avoided)
            wanted.setdefault(number, []).append(digest)
        for number, asked in wanted.items():
            # What others wait for comes before what is for oneself alone.
            asked.sort(key=lambda digest: self._peers.plan.relays[self._places[digest]] == SOURCE)
            if number not in self._providers:
                delay_s = REDIAL_S if number in self._gone else 0.0
                self._providers[number] = _Provider(self, number, delay_s)
            self._providers[number].want(asked)

    def _any_but(self, avoided: set[int]) -> int:
        """Somebody who may hold what the source cannot be asked for; the source itself if nobody is left."""
        own = self._peers.plan.number_of(self._peers.name)
        return next((i for i in self._peers.addresses if i not in avoided and i not in (own, SOURCE)), SOURCE)

    def _look_round(self, now: float) -> None:
        if now - self._progress_at > GIVE_UP_S:
            raise NetworkError(
                f"{len(self._missing)} chunks of a snapshot came from nobody for {GIVE_UP_S:g} s.",
                "Check this node's connection.",
            )
        for number, provider in list(self._providers.items()):
            if provider.pending and now - provider.moved_at > self._patience_s(number):
                provider.asked_at = now
                late = list(provider.pending)[:LATE_CHUNKS]
                if number != SOURCE:
                    self._assign(late, late=number)
            if provider.pending and provider.link is not None and now - provider.heard_at > SILENCE_S:
                provider.link.close()

    def _patience_s(self, number: int) -> float:
        """How long a relay may send nothing to this node: it has a chunk for each of the others first."""
        plan = self._peers.plan
        up = plan.source_up if number == SOURCE else plan.receivers[number].up_bytes_per_s
        return LATE_S + CYCLES * len(plan.receivers) * max(self._sizes.values()) / up if up > 0 else LATE_S

    def address_of(self, number: int) -> Address:
        """Where a provider listens."""
        return self._peers.addresses[number]

    def lost(self, number: int, error: NetworkError) -> None:
        """A provider is gone: ask others for what it owes."""
        provider = self._providers.pop(number)
        log.debug("provider %d is gone: %s", number, error.problem)
        self._gone.add(number)
        if number == SOURCE:
            asyncio.get_running_loop().call_later(REDIAL_S, self._gone.discard, SOURCE)
        self._assign([digest for digest in provider.pending if digest in self._missing])

    def fail(self, error: ShoalError) -> None:
        """End the gathering: this node's own disk is full, say."""
        self._failure = error
        self._done.set()

    def take(self, number: int, frame: bytes) -> None:
        """A chunk has come.

        Raises:
            NetworkError: it is not what it says, or nobody asked for it.
        """
        digest, data = frame[:32], frame[32:]
        node_id = node_id_of(self.address_of(number).public_key)
        if self._sizes.get(digest) != len(data) or blake3(data).digest() != digest:
            self._blame[node_id] += 1
            log.warning("node %s sent a wrong chunk", node_id)
            raise NetworkError("a peer sent a wrong chunk.")
        self._received[node_id] += len(data)
        self._providers[number].paid(digest)
        for provider in self._providers.values():
            provider.got(digest, drop=provider.number != number)
        if digest in self._missing:
            self._store.put_chunk(data, digest)
            del self._missing[digest]
            self._progress_at = asyncio.get_running_loop().time()
            self._on_chunk(digest, data)
            if not self._missing:
                self._done.set()


class _Provider:
    """One peer that is asked for chunks, and the link to it."""

    def __init__(self, gathering: Gathering, number: int, delay_s: float) -> None:
        self._gathering = gathering
        self.number = number
        self.pending: dict[bytes, None] = {}
        self._owed: set[bytes] = set()
        """What was asked over the present link and has not come over it: it may come even where it was dropped."""
        self._wants: list[bytes] = []
        self._drops: list[bytes] = []
        self._changed = asyncio.Event()
        self.link: Link | None = None
        self.asked_at = asyncio.get_running_loop().time()
        """When it was given something to do, or was passed by."""
        self.task = asyncio.create_task(self._run(delay_s))

    @property
    def heard_at(self) -> float:
        """When it last gave a sign of life; one that was asked for nothing need not give any."""
        return self.asked_at if self.link is None else max(self.asked_at, self.link.heard_at)

    @property
    def moved_at(self) -> float:
        """When it last showed that it gets on; a slow one takes long for a chunk, and sends all the while."""
        return self.asked_at if self.link is None else max(self.asked_at, self.link.data_at)

    def want(self, digests: list[bytes]) -> None:
        """Ask for chunks that are not pending here yet."""
        if not self.pending:
            self.asked_at = asyncio.get_running_loop().time()
        new = [digest for digest in digests if digest not in self.pending]
        self.pending.update(dict.fromkeys(new))
        self._wants += new
        self._changed.set()

    def got(self, digest: bytes, *, drop: bool) -> None:
        """A chunk is here; `drop`: it came from another one, so this one need not send it."""
        if digest in self.pending:
            del self.pending[digest]
            if drop:
                self._drops.append(digest)
                self._changed.set()

    def paid(self, digest: bytes) -> None:
        """A chunk has come from this one."""
        self._owed.discard(digest)

    async def _run(self, delay_s: float) -> None:
        address, links = self._gathering.address_of(self.number), self._gathering.links
        try:
            await asyncio.sleep(delay_s)
            is_new = False
            while not is_new:
                self.link, is_new = await links.take(address)
                began_at = self.link.heard_at
                try:
                    await self._use(self.link)
                except NetworkError:
                    # A link that was kept may have been dead for long, which says nothing about the peer.
                    if is_new or self.link.heard_at > began_at:
                        raise
                    self._wants = list(self.pending)
                finally:
                    if self._owed or not self.link.is_between_frames:
                        self.link.close()
                    else:
                        links.put(address, self.link)
        except NetworkError as error:
            self._gathering.lost(self.number, error)
        except ShoalError as error:
            self._gathering.fail(error)

    async def _use(self, link: Link) -> None:
        self._owed.clear()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._ask(link))
                group.create_task(self._listen(link))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, link: Link) -> None:
        while True:
            self._changed.clear()
            wants, self._wants, drops, self._drops = self._wants, [], self._drops, []
            self._owed.update(wants)
            await link.send_digests(Kind.WANT, wants)
            await link.send_digests(Kind.DROP, drops)
            await self._changed.wait()

    async def _listen(self, link: Link) -> None:
        while True:
            kind, frame = await link.receive()
            match kind:
                case Kind.CHUNK:
                    self._gathering.take(self.number, frame)
                case Kind.ALIVE:
                    continue
                case _:
                    raise NetworkError(f"a peer sent a frame of kind {kind.name}.")
