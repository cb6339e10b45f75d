"""Finding who does a step: a beacon goes to all, offers come back, the asker ranks them by the ledger.

    choose ──Beacon, published──▶ every agent ──Offer, sealed──▶ asker ──rank (`planning.selection`)──▶ the best first

Invariants: a beacon says what is required and nothing of the problem; an offer counts once a sender and only for a
beacon that is being listened to; listening ends when everybody has answered, and if anybody has time, after
`listens_s` or as long as offers took lately (`patience`), and at the latest after `PATIENCE_S`; who offers never ranks
itself: the asker reads the ledger, about itself too, where only others write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from shoal.agents.collective.patience import Asking, Patience
from shoal.errors import NetworkError, RecordError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.planning.selection import Candidate, Chosen, rank
from shoal.planning.skills import Tally
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import Beacon, Offer

log = logging.getLogger("shoal.collective")

TOPIC = "collective/beacon"
MAX_BYTES = 16 * 1024
LISTENS_S = 0.08
"""On links with little delay; a network's own round trip comes on top."""

PATIENCE_S = 3.0
"""While nobody at all has offered: machines may be so busy that all answers are late."""

OFFER_S = 5.0
MAX_OFFERS = 256
"""Offers that are being sent at once."""

MAX_SENT = 256
"""Beacons of which late offers still tell how long offers take."""


def offer_key(node: str) -> str:
    """Where a node hears offers."""
    return f"collective/{node}/offer"


class Market:
    """One node's part: it offers what it can, and asks when it needs somebody.

    Args:
        admits: whether a key belongs to the run.
        others: how many other agents are here now, as far as is known.
        offer: what this node offers for a beacon.
        tally: what the ledger says now.
        similar: how alike a requirement and a skill are, 0 to 1.
    """

    def __init__(
        self,
        asking: Asking,
        *,
        admits: Callable[[bytes], bool],
        others: Callable[[], int],
        offer: Callable[[Beacon], Offer],
        tally: Callable[[], Tally],
        similar: Callable[[str, str], float],
        listens_s: float = LISTENS_S,
    ) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._admits = admits
        self._others = others
        self._offer = offer
        self._tally = tally
        self._similar = similar
        self._listens_s = listens_s
        self._open: dict[str, dict[bytes, Offer]] = {}
        self._heard: dict[str, asyncio.Event] = {}
        self._sent: OrderedDict[str, float] = OrderedDict()
        """Beacon -> when, on the monotonic clock."""
        self._patience = Patience()
        self._sending: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Task[None] | None = None

    async def choose(self, requirement: str, lease_s: float, without: Collection[bytes] = ()) -> list[Chosen]:
        """Who could do this, the best first; `without` these."""
        listens_s = min(self._patience.limit_s(self._listens_s), max(self._listens_s, PATIENCE_S))
        beacon = Beacon(id=secrets.token_hex(8), requirement=requirement, listens_s=listens_s, lease_s=lease_s)
        offers = self._open[beacon.id] = {}
        heard = self._heard[beacon.id] = asyncio.Event()
        try:
            await self._hear(beacon, offers, heard)
        finally:
            del self._open[beacon.id], self._heard[beacon.id]
        offers[self._fabric.identity.public_key] = self._offer(beacon)
        candidates = [self._candidate(key, offer) for key, offer in offers.items() if key not in without]
        return rank(self._tally(), candidates, requirement, self._similar)

    async def _hear(self, beacon: Beacon, offers: dict[bytes, Offer], heard: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._sent[beacon.id] = time.monotonic()
        if len(self._sent) > MAX_SENT:
            self._sent.popitem(last=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(began + max(beacon.listens_s, PATIENCE_S)) as limit:
                await self._fabric.publish(TOPIC, encode(beacon))
                while len(offers) < self._others():
                    if any(offer.availability > 0 for offer in offers.values()):
                        limit.reschedule(began + beacon.listens_s)
                    heard.clear()
                    await heard.wait()

    def _candidate(self, key: bytes, offer: Offer) -> Candidate:
        return Candidate(node_id_of(key), key, offer.availability, offer.price_usd, offer.claims)

    # What others ask

    async def __aenter__(self) -> Self:
        await self._fabric.serve(
            offer_key(self._fabric.identity.node_id),
            self._take_offer,
            max_bytes=MAX_BYTES,
            backlog=512,
            allow=self._admits,
        )
        ready = asyncio.Event()
        self._listener = asyncio.create_task(self._listen(ready))
        await ready.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = [task for task in (self._listener, *self._sending) if task is not None]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)

    async def _take_offer(self, request: Request) -> bytes:
        offer = decode(request.body, Offer, max_bytes=MAX_BYTES)
        if (sent := self._sent.get(offer.beacon)) is not None:
            self._patience.answered(min(time.monotonic() - sent, PATIENCE_S))
        if (offers := self._open.get(offer.beacon)) is not None:
            offers.setdefault(request.sender_key, offer)
            self._heard[offer.beacon].set()
        return b""

    async def _listen(self, ready: asyncio.Event) -> None:
        async with self._fabric.subscribe(TOPIC, max_bytes=MAX_BYTES, allow=self._admits) as beacons:
            ready.set()
            async for message in beacons:
                if message.sender_key == self._fabric.identity.public_key:
                    continue
                try:
                    beacon = decode(message.body, Beacon, max_bytes=MAX_BYTES)
                except RecordError as error:
                    log.info("a beacon of %s is malformed: %s", message.sender, error)
                    continue
                if len(self._sending) >= MAX_OFFERS:
                    continue
                task = asyncio.create_task(self._send(message.sender, message.sender_key, self._offer(beacon)))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, asker: str, key: bytes, offer: Offer) -> None:
        try:
            await self._asking.request(offer_key(asker), encode(offer), OFFER_S, to=key, max_reply_bytes=16)
        except NetworkError as error:
            log.info("an offer did not reach %s: %s", asker, error)
