"""One node of the broadcast benchmark: the learner's side or a worker's, in a process of its own at a node of the lab.

It is told what it is by one JSON argument, and what to do by lines on its standard input; it answers by JSON lines.
Everything in it is what a run uses: fabric, store, writer, publisher, relay, fetcher.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from blake3 import blake3

from shoal.broadcast.fetch import Fetcher
from shoal.broadcast.gather import Gathering, Peers
from shoal.broadcast.link import Address
from shoal.broadcast.publisher import Publisher, SnapshotWriter
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import view_of
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.planning.dissemination import SOURCE, Plan
from shoal.protocol.snapshot import PeerRecord

RUN = "benchmark"
LEARNER = Identity(b"broadcast benchmark".ljust(32))
VERSION = 1


class Liar(Relay):
    """Passes on chunks with one bit turned over."""

    async def chunk(self, digest: bytes) -> bytes | None:
        data = await super().chunk(digest)
        return data if data is None else data[:-1] + bytes([data[-1] ^ 1])


async def source(task: dict[str, Any], store: Store, record: PeerRecord, relay: Relay, fabric: Fabric) -> None:
    """Publish one version and serve it."""
    data = random.Random(0).randbytes(task["num_bytes"])
    tensors = {"w": view_of("U8", (len(data),), data)}
    published = await asyncio.to_thread(SnapshotWriter(store, LEARNER, "policy").write, VERSION, tensors)
    publisher = Publisher(fabric, store)
    publisher.offer_links(record)
    await publisher.start()
    hash_ = published.manifest.tensors[0].hash.hex()
    say(ticket=fabric.ticket(RUN, bytes(16)).encode(), hash=hash_, link=[record.host, record.port])
    while await hear():
        say(sent=dict(relay.bytes_sent))


async def worker(task: dict[str, Any], store: Store, record: PeerRecord, relay: Relay, fabric: Fabric) -> None:
    """Fetch when told, pass on, and say when it was whole."""
    listed = record if task["relays"] else PeerRecord(down_bytes_per_s=record.down_bytes_per_s)
    fetcher = Fetcher(fabric, store, [LEARNER.public_key], relay=relay, record=listed)
    await fetcher.introduce()
    say(ready=True, link=[record.host, record.port], key=fabric.identity.public_key.hex())
    progress = 0
    while order := await hear():
        cpu_s = time.process_time()
        if "parent" in order:
            host, port, key = order["parent"]
            await whole_from(fabric.identity, store, fetcher, Address(host, port, bytes.fromhex(key)))

        def on_progress(now: Any) -> None:
            nonlocal progress
            share = 4 * now.bytes_done // now.bytes_total
            if share > progress:
                progress = share
                say(quarter=share)

        snapshot = await fetcher.fetch(VERSION, on_progress=on_progress)
        whole_at = time.time()
        say(
            whole_at=whole_at,
            cpu_s=time.process_time() - cpu_s,
            hash=blake3(snapshot.tensors["w"].data).hexdigest(),
            blame=dict(fetcher.blame),
            received=dict(fetcher.received),
        )


async def whole_from(identity: Identity, store: Store, fetcher: Fetcher, parent: Address) -> None:
    """All chunks from one node that has them: a tree of whole files, each node after its parent."""
    part, _ = await fetcher._find_route(VERSION)
    assert part[0].manifest.whole is not None
    sizes = dict(part[0].manifest.whole.chunk_sizes())
    peers = Peers(Plan(1.0, (), len(sizes)), "child", {SOURCE: parent})
    await Gathering(identity, store, sizes, peers, lambda digest, data: None, blame=Counter(), received=Counter()).run()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def hear() -> dict[str, Any]:
    """The next order; empty at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return dict(json.loads(line)) if line.strip() else {}


async def main() -> None:
    task = json.loads(sys.argv[1])
    is_source = task["role"] == "source"
    identity = LEARNER if is_source else Identity.generate()
    with tempfile.TemporaryDirectory(prefix="shoal-broadcast-") as scratch:
        store = Store(Path(scratch), run=RUN, trusted_key=LEARNER.public_key, durable=False)
        relay = (Liar if task.get("lies") else Relay)(identity, store)
        address = await relay.start(task["host"])
        record = PeerRecord(
            host=address.host,
            port=address.port,
            up_bytes_per_s=task["up_mbps"] * 125e3,
            down_bytes_per_s=task["down_mbps"] * 125e3,
        )
        if is_source:
            opened = Fabric.listen(identity, task["host"])
        else:
            opened = Fabric.connect(identity, Ticket.decode(task["ticket"]), 60.0)
        async with await opened as fabric:
            await (source if is_source else worker)(task, store, record, relay, fabric)
        await relay.close()


if __name__ == "__main__":
    asyncio.run(main())
