"""A light node of a run: joins with its ticket, does no work, and says whom its roster shows.

    python _watcher.py TICKET_FILE VIEWS_FILE

Appends a line of JSON to the second file whenever that changes: the time in Unix seconds, and the ids of the nodes
that are here.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.rollout.link import taking_part

CONNECT_S = 30.0


async def watch(ticket: Ticket, views: Path) -> None:
    """Until the end."""
    async with (
        await Fabric.connect(Identity.generate(), ticket, CONNECT_S) as fabric,
        taking_part(fabric, ticket, "worker", "watcher") as part,
    ):
        shown: list[str] | None = None
        revision = -1
        while True:
            here = [node.id for node in part.member.nodes()]
            if here != shown:
                with views.open("a") as file:
                    file.write(json.dumps({"time": time.time(), "here": here}) + "\n")
                shown = here
            revision = await part.member.changed(revision)


if __name__ == "__main__":
    asyncio.run(watch(Ticket.decode(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
