"""A version to several nodes that pass it on, as in a run: fabric, publisher, relays, fetchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tensors_made import nudged

from shoal.broadcast.fetch import Fetcher, Snapshot
from shoal.broadcast.peers import FORGOTTEN_AFTER_S, PeerBook, peers_of
from shoal.broadcast.publisher import Publisher, SnapshotWriter
from shoal.broadcast.relay import Relay, relaying
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.planning.dissemination import SOURCE
from shoal.protocol.codec import encode
from shoal.protocol.snapshot import MAX_PEERS, Peer, PeerList, PeerRecord

Tensors = dict[str, TensorView]
MakeTensors = Callable[[int], Tensors]
RUN = "a run"
LEARNER = Identity(b"learner".ljust(32))
CHUNK = 2048


class Spread:
    """A learner that offers direct links, and workers that take them."""

    def __init__(self, path: Path, stack: AsyncExitStack) -> None:
        self._path, self._stack = path, stack
        self.fabric: Fabric
        self.publisher: Publisher
        self.relay: Relay

    def store(self, name: str) -> Store:
        return Store(self._path / name, run=RUN, trusted_key=LEARNER.public_key, durable=False)

    async def start(self) -> None:
        self.fabric = await self._stack.enter_async_context(await Fabric.listen(LEARNER))
        store = self.store("source")
        self.writer = SnapshotWriter(store, LEARNER, "policy", chunk_bytes=CHUNK)
        self.publisher = Publisher(self.fabric, store)
        await self.publisher.start()
        self.relay, record = await self._stack.enter_async_context(relaying(LEARNER, store, "127.0.0.1"))
        self.publisher.offer_links(record)

    async def worker(self, name: str) -> Fetcher:
        """A node that takes part; introduced."""
        identity = Identity.generate()
        fabric = await self._stack.enter_async_context(
            await Fabric.connect(identity, self.fabric.ticket(RUN, bytes(16)))
        )
        store = self.store(name)
        relay, record = await self._stack.enter_async_context(relaying(identity, store, "127.0.0.1"))
        fetcher = Fetcher(fabric, store, [LEARNER.public_key], relay=relay, record=record)
        await fetcher.introduce()
        return fetcher


@pytest.fixture
async def spread(tmp_path: Path) -> AsyncIterator[Spread]:
    async with AsyncExitStack() as stack:
        made = Spread(tmp_path, stack)
        await made.start()
        yield made


async def fetch_all(fetchers: list[Fetcher]) -> list[Snapshot]:
    async with asyncio.timeout(60):
        return list(await asyncio.gather(*(fetcher.fetch() for fetcher in fetchers)))


def equal(snapshot: Snapshot, tensors: Tensors) -> bool:
    return {name: bytes(view.data) for name, view in snapshot.tensors.items()} == {
        name: bytes(view.data) for name, view in tensors.items()
    }


async def test_whole_versions_and_changes_are_passed_on(spread: Spread, make_tensors: MakeTensors) -> None:
    fetchers = [await spread.worker(f"w{i}") for i in range(4)]
    tensors, sent = make_tensors(1), 0
    for version in range(1, 5):
        published = spread.writer.write(version, tensors)
        for snapshot in await fetch_all(fetchers):
            assert snapshot.version == version and equal(snapshot, tensors)
        sent += sum(dict((published.manifest.change or published.manifest.bodies[0]).chunk_sizes()).values())
        assert spread.relay.bytes_sent.total() == sent, "each chunk left the learner once"
        tensors = nudged(tensors, version, share=0.3)
    assert spread.publisher.chunk_bytes_served == 0
    for fetcher in fetchers:
        assert fetcher.bytes_fetched == sum(fetcher.received.values()) == sent and not fetcher.blame
        assert len(fetcher.received) == 4, "from the learner and from each of the three others"


async def test_a_late_joiner_takes_its_anchor_from_the_source(spread: Spread, make_tensors: MakeTensors) -> None:
    early = [await spread.worker(f"w{i}") for i in range(2)]
    spread.writer.write(1, make_tensors(1))
    await fetch_all(early)
    spread.writer.write(2, nudged(make_tensors(1), 2))
    await fetch_all(early)
    late = await spread.worker("late")
    assert equal((await fetch_all([late]))[0], nudged(make_tensors(1), 2))
    spread.writer.write(3, nudged(make_tensors(1), 3))
    for snapshot in await fetch_all([*early, late]):
        assert equal(snapshot, nudged(make_tensors(1), 3))


async def test_without_links_chunks_come_through_the_fabric(
    spread: Spread, make_tensors: MakeTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner offers none; or offers some that nobody can reach."""
    fetcher = await spread.worker("w")
    spread.writer.write(1, make_tensors(1))
    spread.publisher._record = None
    assert equal((await fetch_all([fetcher]))[0], make_tensors(1)) and not fetcher.received
    monkeypatch.setattr("shoal.broadcast.gather.GIVE_UP_S", 1.0)
    await spread.relay.close()
    spread.publisher.offer_links(PeerRecord(host="127.0.0.1", port=9))
    spread.writer.write(2, nudged(make_tensors(1), 2))
    assert equal((await fetch_all([fetcher]))[0], nudged(make_tensors(1), 2)) and not fetcher.received


async def test_hostile_introductions(spread: Spread) -> None:
    fetcher = await spread.worker("w")
    node = fetcher._fabric
    key = f"node/{LEARNER.node_id}/peers"
    for where, body in (
        ("policy/none", b"garbage"),
        ("policy/none", encode(PeerRecord(host="h", port=0))),
        ("policy/none", encode(PeerRecord(up_bytes_per_s=float("nan")))),
        ("policy/-1", encode(PeerRecord())),
        ("../1", encode(PeerRecord())),
        ("policy/none", bytes(2000)),
    ):
        with pytest.raises(RemoteError):
            await node.request(f"{key}/{where}", body, 5.0, to=LEARNER.public_key)


def test_the_book_gives_everyone_the_same_list() -> None:
    book, keys = PeerBook(), [bytes([i]) * 32 for i in range(5)]
    for key in keys[:3]:
        book.note(key, PeerRecord(host="h", port=1), 0.0)
    first = book.peers("policy", 1, 1.0)
    assert [peer.public_key for peer in first] == keys[:3]
    book.note(keys[3], PeerRecord(), 2.0)
    assert book.peers("policy", 1, 2.0) == first
    assert [peer.public_key for peer in book.peers("policy", 2, 2.0)] == keys[:4]
    book.note(keys[0], PeerRecord(), FORGOTTEN_AFTER_S)
    assert [peer.public_key for peer in book.peers("policy", 3, FORGOTTEN_AFTER_S + 3)] == [keys[0]]
    for number in range(MAX_PEERS + 10):
        book.note(number.to_bytes(32, "big"), PeerRecord(), FORGOTTEN_AFTER_S)
    assert len(book.peers("policy", 4, FORGOTTEN_AFTER_S)) == MAX_PEERS


def test_peers_of_a_list() -> None:
    """Whoever cannot be connected to relays nothing; an unknown uplink is taken for the median of the known ones."""
    keys = [bytes([i]) * 32 for i in range(5)]
    records = [
        PeerRecord(host="a", port=1, up_bytes_per_s=1e6),
        PeerRecord(host="b", port=2),
        PeerRecord(),
        PeerRecord(host="d", port=4, up_bytes_per_s=3e6),
    ]
    peers = tuple(Peer(public_key=key, record=record) for key, record in zip(keys, records, strict=False))
    source = Peer(public_key=keys[4], record=PeerRecord(host="s", port=5))
    found = peers_of(PeerList(source=source, peers=peers), keys[0], 40)
    by_name = {receiver.name: receiver.up_bytes_per_s for receiver in found.plan.receivers}
    assert by_name == dict(zip(map(node_id_of, keys), (1e6, 2e6, 0.0, 3e6), strict=False))
    assert set(found.addresses.values()) >= {(r.host, r.port, k) for r, k in zip(records, keys, strict=False) if r.host}
    assert found.addresses[SOURCE].host == "s" and len(found.addresses) == 4
    assert found.name == node_id_of(keys[0])
    with pytest.raises(RecordError, match="twice"):
        PeerList(source=source, peers=(peers[0], peers[0])).check()
