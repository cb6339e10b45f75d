"""A version to several nodes that pass it on, as in a run: fabric, publisher, relays, fetchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tensors_made import nudged

from shoal.broadcast.chain import Holds
from shoal.broadcast.fetch import Fetcher, Snapshot
from shoal.broadcast.link import Address, Kind
from shoal.broadcast.peers import FORGOTTEN_AFTER_S, PeerBook, peers_of
from shoal.broadcast.publisher import Publisher, SnapshotWriter
from shoal.broadcast.relay import Relay, relaying
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.planning.dissemination import SOURCE, Receiver, carried
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
        self.relay, self.record = await self._stack.enter_async_context(relaying(LEARNER, store, "127.0.0.1"))
        self.publisher.offer_links(self.relay, self.record)

    async def worker(self, name: str, holds: Holds | None = None) -> Fetcher:
        """A node that takes part; introduced."""
        identity = Identity.generate()
        fabric = await self._stack.enter_async_context(
            await Fabric.connect(identity, self.fabric.ticket(RUN, bytes(16)))
        )
        store = self.store(name)
        relay, record = await self._stack.enter_async_context(relaying(identity, store, "127.0.0.1"))
        fetcher = Fetcher(fabric, store, [LEARNER.public_key], relay=relay, record=record, holds=holds)
        self._stack.callback(fetcher.close)
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


async def test_a_late_joiner_takes_its_anchor_from_all_who_have_it(spread: Spread, make_tensors: MakeTensors) -> None:
    early = [await spread.worker(f"w{i}") for i in range(3)]
    for version in (1, 2, 3):
        spread.writer.write(version, nudged(make_tensors(1), version))
        await fetch_all(early)
    late = await spread.worker("late")
    before = spread.relay.bytes_sent.total()
    assert equal((await fetch_all([late]))[0], nudged(make_tensors(1), 3))
    assert spread.relay.bytes_sent.total() - before < 0.5 * late.bytes_fetched, "most came from the others"
    assert set(late.received) == {LEARNER.node_id, *(fetcher._fabric.identity.node_id for fetcher in early)}
    assert spread.publisher.chunk_bytes_served == 0
    spread.writer.write(4, nudged(make_tensors(1), 4))
    for snapshot in await fetch_all([*early, late]):
        assert equal(snapshot, nudged(make_tensors(1), 4))


async def test_holders_that_hold_nothing_any_more_are_passed_by(
    spread: Spread, make_tensors: MakeTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.broadcast.gather.LATE_S", 0.5)
    early = await spread.worker("w")
    for version in (1, 2, 3):
        spread.writer.write(version, nudged(make_tensors(1), version))
        await fetch_all([early])
    assert early._whole == 1
    for path in (early._store.directory / "chunks").glob("??/*"):
        path.unlink()
    late = await spread.worker("late")
    assert equal((await fetch_all([late]))[0], nudged(make_tensors(1), 3))
    assert late.received == {LEARNER.node_id: late.bytes_fetched} and spread.publisher.chunk_bytes_served == 0


async def test_without_links_chunks_come_through_the_fabric(
    spread: Spread, make_tensors: MakeTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner offers none; or offers some that nobody can reach."""
    fetcher = await spread.worker("w")
    spread.writer.write(1, make_tensors(1))
    spread.publisher._links = None
    assert equal((await fetch_all([fetcher]))[0], make_tensors(1))
    assert spread.publisher.chunk_bytes_served == fetcher.received[LEARNER.node_id] == fetcher.bytes_fetched > 0
    monkeypatch.setattr("shoal.broadcast.gather.GIVE_UP_S", 1.0)
    await spread.relay.close()
    spread.publisher.offer_links(spread.relay, PeerRecord(host="127.0.0.1", port=9))
    spread.writer.write(2, nudged(make_tensors(1), 2))
    assert equal((await fetch_all([fetcher]))[0], nudged(make_tensors(1), 2))
    assert spread.publisher.chunk_bytes_served == fetcher.received[LEARNER.node_id] == fetcher.bytes_fetched


async def test_links_stay_open_for_the_next_version(spread: Spread, make_tensors: MakeTensors) -> None:
    fetchers = [await spread.worker(f"w{i}") for i in range(3)]
    tensors = make_tensors(1)
    opened = []
    for version in range(1, 4):
        spread.writer.write(version, tensors)
        await fetch_all(fetchers)
        opened.append({serving.number for serving in spread.relay._links})
        tensors = nudged(tensors, version, share=0.3)
    assert len(opened[0]) == 3 and opened[0] == opened[1] == opened[2]


async def test_a_link_that_died_between_two_versions_is_opened_again(spread: Spread, make_tensors: MakeTensors) -> None:
    fetchers = [await spread.worker(f"w{i}") for i in range(3)]
    spread.writer.write(1, make_tensors(1))
    await fetch_all(fetchers)
    for serving in list(spread.relay._links):
        assert serving.link is not None
        serving.link.close()
    spread.writer.write(2, nudged(make_tensors(1), 2))
    for snapshot in await fetch_all(fetchers):
        assert equal(snapshot, nudged(make_tensors(1), 2))
    assert spread.publisher.chunk_bytes_served == 0, "nobody had to ask through the fabric"


async def test_a_revoked_nodes_open_links_serve_it_no_more(spread: Spread, make_tensors: MakeTensors) -> None:
    revoked: set[bytes] = set()
    spread.relay._allow = spread.publisher.allow = lambda key: key not in revoked
    stays, goes = [await spread.worker(f"w{i}") for i in range(2)]
    spread.writer.write(1, make_tensors(1))
    await fetch_all([stays, goes])
    revoked.add(goes._fabric.identity.public_key)
    before = spread.relay.bytes_sent[goes._fabric.identity.node_id]
    published = spread.writer.write(2, nudged(make_tensors(1), 2))
    link, is_new = await goes._links.take(Address(spread.record.host, spread.record.port, LEARNER.public_key))
    assert not is_new
    await link.send_digests(Kind.WANT, list(published.manifest.bodies[0].chunks))
    async with asyncio.timeout(10):
        with pytest.raises(NetworkError):
            await link.receive()
    assert spread.relay.bytes_sent[goes._fabric.identity.node_id] == before


async def test_who_holds_some_tensors_fetches_only_theirs(spread: Spread, make_tensors: MakeTensors) -> None:
    """Beside nodes that hold all, over whole versions, changes and a late joiner; through the fabric as well."""
    whole = await spread.worker("whole")
    stage = await spread.worker("stage", holds=lambda name: name == "a")
    tensors = make_tensors(1)
    for version in range(1, 4):
        spread.writer.write(version, tensors)
        everything, part = await fetch_all([whole, stage])
        assert equal(everything, tensors)
        assert {name: bytes(view.data) for name, view in part.tensors.items()} == {"a": bytes(tensors["a"].data)}
        tensors = nudged(tensors, version, share=0.3)
    assert stage.bytes_fetched < 0.75 * whole.bytes_fetched
    assert set(stage.received) <= {LEARNER.node_id, whole._fabric.identity.node_id}
    late = await spread.worker("late", holds=lambda name: name in ("b", "empty"))
    (part,) = await fetch_all([late])
    assert {name: view.num_bytes for name, view in part.tensors.items()} == {"b": 8, "empty": 0}
    assert late.bytes_fetched < whole.bytes_fetched / 4
    spread.publisher._links = None
    before = stage.bytes_fetched
    spread.writer.write(4, tensors)
    (part,) = await fetch_all([stage])
    assert bytes(part.tensors["a"].data) == bytes(tensors["a"].data)
    assert 0 < spread.publisher.chunk_bytes_served == stage.bytes_fetched - before


async def test_how_a_version_came(spread: Spread, make_tensors: MakeTensors) -> None:
    fetchers = [await spread.worker(f"w{i}") for i in range(3)]
    spread.writer.write(1, make_tensors(1))
    for snapshot in await fetch_all(fetchers):
        assert sum(snapshot.arrival.by_source.values()) == 100_608 and snapshot.arrival.seconds > 0
        assert len(snapshot.arrival.by_source) == 3
    for snapshot in await fetch_all(fetchers):
        assert snapshot.arrival.by_source == {}, "it was here already"


async def test_a_liar_is_not_asked_for_later_versions(
    spread: Spread, make_tensors: MakeTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, liar = [await spread.worker(f"w{i}") for i in range(3)], await spread.worker("liar")
    assert liar._relay is not None
    truly = liar._relay.chunk

    async def lie(digest: bytes) -> bytes | None:
        data = await truly(digest)
        return data and data[:-1] + bytes([data[-1] ^ 1])

    monkeypatch.setattr(liar._relay, "chunk", lie)
    name = liar._fabric.identity.node_id
    for version in range(1, 4):
        spread.writer.write(version, nudged(make_tensors(1), version, share=0.3))
        for snapshot in await fetch_all([*honest, liar]):
            assert equal(snapshot, nudged(make_tensors(1), version, share=0.3))
        assert [fetcher.blame[name] for fetcher in honest] == [1, 1, 1]
    assert not any(fetcher.received[name] for fetcher in honest)


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

    def listed(version: int, now: float, up_bytes_per_s: float = 0.0) -> PeerList:
        record = PeerRecord(host="s", port=1, up_bytes_per_s=up_bytes_per_s)
        return book.peers("policy", version, Peer(public_key=keys[4], record=record), now)

    first = listed(1, 1.0)
    assert [peer.public_key for peer in first.peers] == keys[:3]
    book.note(keys[3], PeerRecord(), 2.0)
    assert listed(1, 2.0, up_bytes_per_s=5.0) == first, "also of what the source says of itself"
    assert [peer.public_key for peer in listed(2, 2.0).peers] == keys[:4]
    book.note(keys[0], PeerRecord(), FORGOTTEN_AFTER_S)
    assert [peer.public_key for peer in listed(3, FORGOTTEN_AFTER_S + 3).peers] == [keys[0]]
    for number in range(MAX_PEERS + 10):
        book.note(number.to_bytes(32, "big"), PeerRecord(), FORGOTTEN_AFTER_S)
    assert len(listed(4, FORGOTTEN_AFTER_S).peers) == MAX_PEERS


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
    _, expected = carried(2e6, [Receiver(node_id_of(k), up) for k, up in zip(keys, (1e6, 2e6, 0.0, 3e6), strict=False)])
    assert by_name == {receiver.name: receiver.up_bytes_per_s for receiver in expected}
    assert sorted(by_name.values())[0] == 0.0 and sorted(by_name.values())[-1] == pytest.approx(3e6, rel=0.1)
    assert set(found.addresses.values()) >= {(r.host, r.port, k) for r, k in zip(records, keys, strict=False) if r.host}
    assert found.addresses[SOURCE].host == "s" and len(found.addresses) == 4
    assert found.name == node_id_of(keys[0])
    with pytest.raises(RecordError, match="twice"):
        PeerList(source=source, peers=(peers[0], peers[0])).check()
