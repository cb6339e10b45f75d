"""One node's events to others and theirs to it: each asks the others, in turn and at random, for what came since.

    every `every_s`: "your store S, after position P" ──▶ a random peer ──▶ a page of signed events, its new position

A position is the peer's own order of arrival, so asking from where one stopped misses nothing, also of what the peer
heard from third nodes. State is a function of the set of events (`state`), so nodes that have each other's events hold
the same memories, however often they were apart.

Invariants: an event enters only with the signature of the node that it names, and only of nodes that `admits` lets in;
what belongs to a user's scope never leaves its node; pages and rounds are bounded; a peer that sends what is forged or
malformed is left for that round, and what came before in the page stays out with it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence

from shoal.errors import NetworkError, RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.memory.keeper import Keeper
from shoal.memory.signing import SignedEvent, verified
from shoal.protocol.codec import Record, decode, encode

log = logging.getLogger("shoal.memory")

MAX_PAGE_EVENTS = 512
MAX_EVENT_BYTES = 2**20
"""Of one shared event, and of a page's events together; larger contexts stay where they are."""

MAX_PAGE_BYTES = 4 * 2**20
MAX_ASK_BYTES = 4096
ROUND_PAGES = 64
"""Pages in a row from one peer."""

ASK_S = 10.0


def events_key(node: str) -> str:
    """Where a node gives pages of its events."""
    return f"memory/{node}/events"


class Since(Record, frozen=True):
    """What came to a store after a position."""

    store: str
    """Name of the store that the position is of; of another one, all is wanted."""
    position: int

    def check(self) -> None:
        if len(self.store) > 64 or not 0 <= self.position < 2**62:
            raise RecordError("a store's name is too long, or the position out of range.")


class Page(Record, frozen=True):
    """Events, and where to go on."""

    store: str
    events: tuple[SignedEvent, ...]
    position: int
    complete: bool

    def check(self) -> None:
        if len(self.store) > 64 or not 0 <= self.position < 2**62 or len(self.events) > MAX_PAGE_EVENTS:
            raise RecordError("a page's store, position or number of events is out of range.")
        for event in self.events:
            event.check()


class Sharing:
    """One node's part.

    Args:
        peers: public keys of the nodes to ask.
        admits: whether what the node with a key says is let in, and whether it may ask.
    """

    def __init__(
        self,
        fabric: Fabric,
        keeper: Keeper,
        peers: Callable[[], Sequence[bytes]],
        admits: Callable[[bytes], bool],
        *,
        every_s: float = 2.0,
    ) -> None:
        self._fabric, self._keeper, self._peers, self._admits = fabric, keeper, peers, admits
        self._every_s = every_s
        self._heard: dict[bytes, Since] = {}
        self.counters: Counter[str] = Counter()

    async def start(self) -> None:
        """Begin to give pages."""
        key = events_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._give, max_bytes=MAX_ASK_BYTES, concurrency=4, allow=self._admits)

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1.5))
            if peers := self._peers():
                await self.ask(random.choice(peers))

    async def ask(self, key: bytes) -> int:
        """Take from one node what this one lacks; returns how many events were new."""
        new = 0
        try:
            for _ in range(ROUND_PAGES):
                since = self._heard.get(key, Since(store="", position=0))
                answer = await self._fabric.request(
                    events_key(node_id_of(key)),
                    encode(since),
                    ASK_S,
                    to=key,
                    max_reply_bytes=MAX_PAGE_BYTES,
                    absent_grace_s=0.2,
                )
                page = decode(answer, Page, max_bytes=MAX_PAGE_BYTES)
                for signed in page.events:
                    verified(signed)
                admitted = [signed for signed in page.events if self._admits(signed.signer)]
                self.counters["not_admitted"] += len(page.events) - len(admitted)
                new += self._keeper.receive(admitted)
                if since.store == page.store and page.position <= since.position:
                    break
                self._heard[key] = Since(store=page.store, position=page.position)
                if page.complete:
                    break
        except NetworkError as error:
            self.counters["unanswered"] += 1
            log.info("no events of %s: %s", node_id_of(key), error)
        except RecordError as error:
            self.counters["refused"] += 1
            log.warning("what %s sends is refused: %s", node_id_of(key), error)
        return new

    async def _give(self, request: Request) -> bytes:
        since = decode(request.body, Since, max_bytes=MAX_ASK_BYTES)
        store = self._keeper.store
        after = since.position if since.store == store.name and since.position <= store.position else 0
        events, position = store.shared_since(after, MAX_PAGE_EVENTS, MAX_EVENT_BYTES)
        page = Page(store=store.name, events=tuple(events), position=position, complete=position >= store.position)
        return encode(page)
