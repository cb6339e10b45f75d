"""One ledger for all: nodes ask each other, in turn and at random, for the entries that they lack.

    every `every_s`: own heads ──▶ a random agent ──▶ the page of what is missing ──▶ … until it is complete

Invariants: both sides ask, so both end with the union; a page is bounded, and so is the number of pages of one round;
what a page brings is merged by `swarm.ledger`'s rules, whoever sent it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from shoal.errors import NetworkError, RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.ledger import LedgerHeads, LedgerPage
from shoal.swarm.ledger import Ledger

log = logging.getLogger("shoal.collective")

MAX_HEADS_BYTES = 2**20
MAX_PAGE_BYTES = 4 * 2**20
ROUND_PAGES = 64
ASK_S = 5.0


def ledger_key(node: str) -> str:
    """Where a node gives pages of its ledger."""
    return f"collective/{node}/ledger"


class Sharing:
    """One node's part.

    Args:
        peers: public keys of the other agents that are here.
    """

    def __init__(self, fabric: Fabric, ledger: Ledger, peers: Callable[[], Sequence[bytes]], every_s: float) -> None:
        self._fabric = fabric
        self._ledger = ledger
        self._peers = peers
        self._every_s = every_s

    async def start(self, admits: Callable[[bytes], bool]) -> None:
        """Begin to give pages."""
        key = ledger_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._give, max_bytes=MAX_HEADS_BYTES, concurrency=4, allow=admits)

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1.5))
            if peers := self._peers():
                await self.ask(random.choice(peers))

    async def ask(self, key: bytes) -> int:
        """Take from one node what this one lacks; returns how much was new."""
        new = 0
        try:
            for _ in range(ROUND_PAGES):
                body = encode(self._ledger.heads())
                answer = await self._fabric.request(
                    ledger_key(node_id_of(key)), body, ASK_S, to=key, max_reply_bytes=MAX_PAGE_BYTES, absent_grace_s=0.2
                )
                page = decode(answer, LedgerPage, max_bytes=MAX_PAGE_BYTES)
                taken = self._ledger.take(page)
                new += taken
                if page.complete or not taken:
                    break
        except (NetworkError, RecordError) as error:
            log.info("no page of %s's ledger: %s", node_id_of(key), error)
        return new

    async def _give(self, request: Request) -> bytes:
        return encode(self._ledger.page_for(decode(request.body, LedgerHeads, max_bytes=MAX_HEADS_BYTES)))
