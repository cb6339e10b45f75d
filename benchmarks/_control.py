"""Says planted plaintexts aloud through a router: what its tap must find, or its silence proves nothing.

    python _control.py TICKET_FILE PLANT_FILE

Two fabrics connect with a run's ticket; one publishes, which is signed and not sealed, what the other subscribes to.
Prints the number of patterns that arrived.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket

TOPIC = "benchmark/control"
MESSAGE_PATTERNS = 64
"""A message with so many fits into one frame of the transport, so that none of them is split."""

CONNECT_S = 30.0
ARRIVE_S = 30.0


async def say_aloud(ticket: Ticket, patterns: list[bytes]) -> int:
    """How many of the patterns were heard again."""
    async with AsyncExitStack() as stack:
        speaker, hearer = [
            await stack.enter_async_context(await Fabric.connect(Identity.generate(), ticket, CONNECT_S)) for _ in "ab"
        ]
        subscription = await stack.enter_async_context(hearer.subscribe(TOPIC))
        await asyncio.sleep(1.0)  # the router has to hear of the subscription
        for start in range(0, len(patterns), MESSAGE_PATTERNS):
            await speaker.publish(TOPIC, msgspec.msgpack.encode(patterns[start : start + MESSAGE_PATTERNS]), wait=True)
        num_heard = 0
        async with asyncio.timeout(ARRIVE_S):
            async for message in subscription:
                num_heard += len(msgspec.msgpack.decode(message.body, type=list[bytes]))
                if num_heard == len(patterns):
                    break
        return num_heard


if __name__ == "__main__":
    ticket_file, plant_file = map(Path, sys.argv[1:])
    planted = msgspec.msgpack.decode(plant_file.read_bytes(), type=list[bytes])
    print(asyncio.run(say_aloud(Ticket.decode(ticket_file.read_text()), planted)), flush=True)
