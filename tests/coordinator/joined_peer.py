"""A node in a process of its own that joins and beats: `joined_peer.py TICKET NAME`. Prints its id when it has."""

from __future__ import annotations

import asyncio
import sys

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.rollout.link import taking_part

BEAT_S = 0.3


async def main(text: str, name: str) -> None:
    ticket = Ticket.decode(text)
    async with (
        await Fabric.connect(Identity.generate(), ticket) as fabric,
        taking_part(fabric, ticket, "worker", name) as part,
    ):
        await part.link.lease(0, 4)
        print(part.link.node_id, flush=True)
        while True:
            await part.link.heartbeat(0, {}, 5.0)
            await asyncio.sleep(BEAT_S)


asyncio.run(main(*sys.argv[1:]))
