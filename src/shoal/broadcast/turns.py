"""Who sends when a few may send at a time: whoever is furthest behind.

Left to themselves, a node's links share its uplink unevenly for seconds at a time. That costs nothing to those who
take, and much to a relay whose stripe comes late: what it gets last it must still pass on to everybody else. And where
many links send at once over a slow uplink, what each must have under way is together more than the queue holds.

Invariants: at most `number` hold a turn; of those that wait, the lowest rank goes first, and the longest waiting of
equal ranks; a turn is given back however its holder ends.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Of one node.

    Args:
        number: at a time.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._serial = itertools.count()

    @property
    def all_taken(self) -> bool:
        """Whether the next one must wait."""
        return self._free == 0

    @asynccontextmanager
    async def turn(self, rank: float) -> AsyncIterator[None]:
        """Inside, the caller has a turn."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(rank)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, rank: float) -> None:
        given = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._serial), given))
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():  # It was given just now.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            given = heapq.heappop(self._waiting)[2]
            if not given.done():
                given.set_result(None)
                return
        self._free += 1
