"""A node in a process of its own that publishes two versions and serves them until its standard input closes.

python serve_store.py DIRECTORY        prints its ticket
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from shoal.broadcast.publisher import Publisher, write_snapshot
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import view_of
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity

LEARNER = Identity(b"learner".ljust(32))


async def main(directory: Path) -> None:
    store = Store(directory, run="a run", trusted_key=LEARNER.public_key)
    for version in (1, 2):
        data = random.Random(version).randbytes(30_000_001)
        write_snapshot(store, LEARNER, "policy", version, {"w": view_of("U8", (30_000_001,), data)}, chunk_bytes=2**20)
    async with await Fabric.listen(Identity.generate()) as fabric:
        publisher = Publisher(fabric, store)
        await publisher.start()
        print(fabric.ticket("a run", bytes(16)).encode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


asyncio.run(main(Path(sys.argv[1])))
