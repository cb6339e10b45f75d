"""Links that stay open between two versions: to open one takes four times the way to its other end and back.

Invariants: a link is lent to one user at a time; only one on which nothing is under way comes back, so that whoever
takes it next hears nothing that it did not ask for; those kept are bounded in number, and none is lent again after
`KEPT_S` without use.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from shoal.broadcast.link import Address, Link, dial
from shoal.fabric.identity import Identity

KEPT_S = 300.0
"""A NAT on the way forgets what was silent for long."""

MAX_KEPT = 256


class LinkPool:
    """One node's links to others.

    Args:
        identity: proves who dials.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._kept: OrderedDict[Address, tuple[float, Link]] = OrderedDict()
        """Longest unused first, with the time of last use."""

    async def take(self, address: Address) -> tuple[Link, bool]:
        """A link to `address`, and whether it is a new one; an old one may have ended without anybody's knowing.

        Raises:
            NetworkError: it is not there, or is another.
        """
        now = asyncio.get_running_loop().time()
        used_at, link = self._kept.pop(address, (0.0, None))
        if link is not None and now - used_at <= KEPT_S and not link.is_closing:
            link.heard_at = link.data_at = now
            return link, False
        if link is not None:
            link.close()
        return await dial(self._identity, address), True

    def put(self, address: Address, link: Link) -> None:
        """Give back a link on which nothing is under way."""
        if address in self._kept or link.is_closing:
            link.close()
            return
        self._kept[address] = (asyncio.get_running_loop().time(), link)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)[1][1].close()

    def close(self) -> None:
        """End all that are kept."""
        for _, link in self._kept.values():
            link.close()
        self._kept.clear()
