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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from shoal.broadcast.fetch import Fetcher, Snapshot
from shoal.broadcast.gather import Gathering, Peers
from shoal.broadcast.link import Address
from shoal.broadcast.pool import LinkPool
from shoal.broadcast.publisher import Publisher, SnapshotWriter
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import view_of
from shoal.errors import NetworkError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.planning.dissemination import SOURCE, Plan
from shoal.protocol.snapshot import PeerRecord

RUN = "benchmark"
LEARNER = Identity(b"broadcast benchmark".ljust(32))
LOOK_S = 0.05
MAX_RETRIES, RETRY_S = 20, 0.5
NUM_TENSORS = 4


class Liar(Relay):
    """Passes on what it was not asked for, once `lie` says what; honest until then."""

    lie = ""
    old: bytes = b""
    """A chunk of an earlier version."""
    before: bytes = b""
    """The chunk that was asked for before."""

    async def chunk(self, digest: bytes) -> bytes | None:
        data = await super().chunk(digest)
        if data is None or not self.lie:
            return data
        before, self.before = self.before or data[::-1], data
        lies = {
            "corrupted": data[:-1] + bytes([data[-1] ^ 1]),
            "reordered": before,
            "old": self.old[: len(data)],
            "foreign": random.Random(digest).randbytes(len(data)),
        }
        return lies[self.lie]


def content(version: int, num_bytes: int) -> bytes:
    """What a version is made of."""
    return random.Random(version).randbytes(num_bytes)


def nudged(data: bytes, seed: int) -> bytes:
    """One byte of a hundred changed."""
    changed, chosen = bytearray(data), random.Random(seed)
    for place in chosen.sample(range(len(data)), len(data) // 100):
        changed[place] ^= 1
    return bytes(changed)


async def source(task: dict[str, Any], store: Store, record: PeerRecord, relay: Liar, fabric: Fabric) -> None:
    """Publish versions and serve them."""
    writer = SnapshotWriter(store, LEARNER, "policy")

    def publish(version: int, data: bytes) -> str:
        size = len(data) // NUM_TENSORS
        parts = [data[n * size : (n + 1) * size] for n in range(NUM_TENSORS)]
        published = writer.write(version, {f"w{n}": view_of("U8", (size,), part) for n, part in enumerate(parts)})
        return blake3(b"".join(tensor.hash for tensor in published.manifest.tensors)).hexdigest()

    data = content(1, task["num_bytes"])
    hash_ = await asyncio.to_thread(publish, 1, data)
    publisher = Publisher(fabric, store)
    publisher.offer_links(relay, record)
    await publisher.start()
    say(ticket=fabric.ticket(RUN, bytes(16)).encode(), hash=hash_, link=[record.host, record.port])
    last_sent_at = 0.0

    async def look() -> None:
        nonlocal last_sent_at
        before = 0
        while True:
            if (now := relay.bytes_sent.total()) > before:
                before, last_sent_at = now, time.time()
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look())
    while order := await hear():
        if "publish" in order:
            version = order["publish"]
            data = nudged(data, version) if order["nudge"] else content(version, task["num_bytes"])
            say(hash=await asyncio.to_thread(publish, version, data))
        else:
            say(sent=dict(relay.bytes_sent), last_sent_at=last_sent_at)
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking


async def worker(task: dict[str, Any], store: Store, record: PeerRecord, relay: Liar, fabric: Fabric) -> None:
    """Fetch when told, pass on, and say when it was whole."""
    listed = record if task["relays"] else PeerRecord(down_bytes_per_s=record.down_bytes_per_s)
    wanted = {f"w{n}" for n in range(task["holds"])}
    holds = None if len(wanted) == NUM_TENSORS else wanted.__contains__
    fetcher = Fetcher(fabric, store, [LEARNER.public_key], relay=relay, record=listed, holds=holds)
    await fetcher.introduce()
    say(ready=True, link=[record.host, record.port], key=fabric.identity.public_key.hex())
    while order := await hear():
        if "lie" in order:
            relay.lie = order["lie"]
            relay.old = content(1, task["num_bytes"])[: 128 * 2**10]
            continue
        cpu_s, marks = time.process_time(), {}

        def on_progress(now: Any, marks: dict[str, float] = marks) -> None:
            quarter = 4 * now.bytes_done // now.bytes_total
            marks.setdefault("first", time.time())
            if quarter and str(quarter) not in marks:
                marks[str(quarter)] = time.time()
                say(quarter=quarter)

        if "parent" in order:
            host, port, key = order["parent"]
            await whole_from(fabric.identity, store, fetcher, order["go"], Address(host, port, bytes.fromhex(key)))
        snapshot = await persistently(lambda: fetcher.fetch(order["go"], on_progress=on_progress))
        whole_at = time.time()
        for quarter in "321":
            marks.setdefault(quarter, marks.get(str(int(quarter) + 1), whole_at))
        say(
            whole_at=whole_at,
            cpu_s=time.process_time() - cpu_s,
            marks={**marks, "first": marks.get("first", whole_at), "last": marks.get("4", whole_at)},
            hash=hash_of(snapshot) if holds is None else "",
            blame=dict(fetcher.blame),
            received=dict(fetcher.received),
        )


async def persistently(fetch: Callable[[], Awaitable[Snapshot]]) -> Snapshot:
    """Again where the source, on a busy machine, did not answer in time, as a worker of a run does."""
    for _ in range(MAX_RETRIES):
        try:
            return await fetch()
        except NetworkError as error:
            print(f"asked again: {error.problem}", file=sys.stderr)
            await asyncio.sleep(RETRY_S)
    return await fetch()


def hash_of(snapshot: Snapshot) -> str:
    """What was loaded."""
    return blake3(b"".join(blake3(view.data).digest() for view in snapshot.tensors.values())).hexdigest()


async def whole_from(identity: Identity, store: Store, fetcher: Fetcher, version: int, parent: Address) -> None:
    """All chunks from one node that has them: a tree of whole files, each node after its parent."""
    part, _ = await fetcher._find_route(version)
    assert part[0].manifest.whole is not None
    sizes = dict(part[0].manifest.whole.chunk_sizes())
    peers = Peers(Plan(1.0, (), len(sizes)), "child", {SOURCE: parent})
    links = LinkPool(identity)
    await Gathering(links, store, sizes, peers, lambda digest, data: None, blame=Counter(), received=Counter()).run()
    links.close()


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
    with tempfile.TemporaryDirectory(dir=task["scratch"]) as scratch:
        store = Store(Path(scratch), run=RUN, trusted_key=LEARNER.public_key, durable=False)
        relay = Liar(identity, store)
        address = await relay.start(task["host"])
        record = PeerRecord(
            host=address.host,
            port=address.port,
            up_bytes_per_s=task.get("up_mbps", 0.0) * 125e3,
            down_bytes_per_s=task.get("down_mbps", 0.0) * 125e3,
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
