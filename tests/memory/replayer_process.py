"""A replayer in a process of its own, to be killed: `replayer_process.py MODEL TICKET`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from memory_arenas import make_arena

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.memory.replayer import Replayer


async def main(model: Path, ticket: Ticket) -> None:
    arena = make_arena(model, takes_s=5.0)
    async with await Fabric.connect(Identity.generate(), ticket) as fabric:
        await Replayer(fabric, {arena.family: arena}, lambda: [ticket.coordinator_key]).run()


asyncio.run(main(Path(sys.argv[1]), Ticket.decode(sys.argv[2])))
