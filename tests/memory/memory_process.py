"""A node that remembers and shares, in a process of its own: `memory_process.py FOLDER SEED [TICKET]`.

Without a ticket it listens, and prints one. Then it obeys lines: `work N` does N random things, `state` prints what its
store amounts to, `end` ends it. It shares all the while with whoever it is told about: `peer KEY`.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import msgspec
from memory_makers import make_entry, make_trial

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.memory.keeper import Keeper
from shoal.memory.records import content_hash
from shoal.memory.sharing import Sharing

SECRET = b"0123456789abcdef"
TOPICS = ("carry the one to the next column", "borrow from the column on the left", "round before you multiply")


def act(keeper: Keeper, draw: random.Random) -> None:
    """One random thing that may happen to memories."""
    memories = list(keeper.store.memories())
    choice = draw.random()
    if choice < 0.35 or not memories:
        # From a small pool, so that both nodes write down the same things.
        keeper.add(make_entry(f"{draw.choice(TOPICS)} {draw.randrange(12)} times over"))
        return
    one = draw.choice(memories)
    if choice < 0.65:
        first = draw.randrange(1000) * 30
        keeper.report(one.id, [make_trial(first + n, 0.0, 1.0) for n in range(30)])
    elif choice < 0.85:
        keeper.used([one.id], draw.choice((-1.0, 0.5, 1.0)))
    elif choice < 0.92:
        keeper.maintain()
    elif choice < 0.96:
        keeper.remove(one.id)
    else:
        keeper.undo([draw.choice(keeper.store.ids_since(0))])


def state(keeper: Keeper) -> str:
    memories = {memory.id: msgspec.to_builtins(memory) for memory in keeper.store.memories()}
    events = sorted(keeper.store.ids_since(0))
    return f"{content_hash('state', memories)} {content_hash('events', events)} {len(memories)} {len(events)}"


async def main(folder: Path, seed: int, ticket: str) -> None:
    identity = Identity.generate()
    draw = random.Random(seed)
    peers: list[bytes] = []
    opened = Fabric.connect(identity, Ticket.decode(ticket)) if ticket else Fabric.listen(identity)
    with Keeper(folder, identity) as keeper:
        async with await opened as fabric:
            sharing = Sharing(fabric, keeper, lambda: peers, lambda key: True, every_s=0.2)
            await sharing.start()
            task = asyncio.create_task(sharing.run())
            say(identity.public_key.hex() + (f" {fabric.ticket('run', SECRET).encode()}" if not ticket else ""))
            while (line := await asyncio.to_thread(sys.stdin.readline)).strip() not in ("", "end"):
                what, _, value = line.strip().partition(" ")
                if what == "peer":
                    peers.append(bytes.fromhex(value))
                elif what == "work":
                    for _ in range(int(value)):
                        act(keeper, draw)
                        await asyncio.sleep(0.01)
                    say("done")
                else:
                    say(state(keeper))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def say(words: str) -> None:
    print(words, flush=True)


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
