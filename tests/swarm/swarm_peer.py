"""A node of the swarm in a process of its own: `swarm_peer.py TICKET NAME`. Prints whom it sees, when that changes."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from swarm_nodes import ROOT, RUN, grant, identity, ids, profile

from shoal.fabric.fabric import Fabric
from shoal.fabric.ticket import Ticket
from shoal.swarm.gossip import Gossip
from shoal.swarm.grants import GrantBook
from shoal.swarm.roster import Roster


async def main(ticket: str, name: str) -> None:
    node = identity(name)
    grants = GrantBook(RUN, ROOT.public_key)
    now = time.time()
    grants.merge_grant(grant(node, now=now), now)
    fabric = await Fabric.connect(node, Ticket.decode(ticket))
    async with fabric, Gossip(fabric, Roster(RUN, grants), profile(node, name=name)) as gossip:
        seen = 0
        while True:
            seen = await gossip.changed(seen)
            print(" ".join(sorted(ids(gossip))), flush=True)


asyncio.run(main(*sys.argv[1:]))
