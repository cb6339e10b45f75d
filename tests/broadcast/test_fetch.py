"""From one node's store to another's: whole, verified, and only what is missing."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tensors_made import nudged

import shoal
from shoal.broadcast.chain import build_manifest, sign_manifest
from shoal.broadcast.fetch import MAX_BLAME, Fetcher, Progress, Snapshot, SnapshotGone
from shoal.broadcast.publisher import Publisher, SnapshotWriter, announcements, write_snapshot
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView, view_of
from shoal.errors import NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import encode
from shoal.protocol.snapshot import ChainPart, SignedManifest

Tensors = dict[str, TensorView]
MakeStore = Callable[[str], Store]
MakeTensors = Callable[[int], Tensors]
Source = tuple[Fabric, Store, Publisher]
CHUNK = 8192


def fetcher_of(node: Fabric, store: Store, source: Source, **kw: object) -> Fetcher:
    return Fetcher(node, store, [source[0].identity.public_key], **kw)  # type: ignore[arg-type]


def publish(source: Source, learner: Identity, version: int, tensors: Tensors) -> None:
    write_snapshot(source[1], learner, "policy", version, tensors, chunk_bytes=CHUNK)


def chunk_file(store: Store, digest: bytes) -> Path:
    return store.directory / "chunks" / digest.hex()[:2] / digest.hex()


def equal(snapshot: Snapshot, tensors: Tensors) -> bool:
    return snapshot.tensors.keys() == tensors.keys() and all(
        (got.dtype, got.shape, bytes(got.data)) == (tensors[name].dtype, tensors[name].shape, bytes(tensors[name].data))
        for name, got in snapshot.tensors.items()
    )


async def test_round_trip_and_only_what_changed(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    fetcher = fetcher_of(node, make_store("mine"), source)
    with pytest.raises(SnapshotGone, match="Wait for the learner"):
        await fetcher.fetch()
    publish(source, learner, 1, make_tensors(1))
    seen: list[Progress] = []
    first = await fetcher.fetch(on_progress=seen.append)
    assert first.version == 1 and equal(first, make_tensors(1))
    total = 40_000 + 60_600 + 8
    assert fetcher.bytes_fetched == total == seen[-1].bytes_done == seen[0].bytes_total
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen) and len(seen) == 13

    publish(source, learner, 2, make_tensors(2))
    second = await fetcher.fetch()
    assert second.version == 2 and equal(second, make_tensors(2))
    assert total < fetcher.bytes_fetched < 2 * total  # Chunks that stayed the same were not fetched again.
    assert source[2].chunk_bytes_served == (fetched := fetcher.bytes_fetched)

    again = await fetcher.fetch(1)
    assert equal(again, make_tensors(1)) and fetcher.bytes_fetched == fetched


async def test_changes_are_fetched_by_whoever_holds_the_parent(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    writer = SnapshotWriter(source[1], learner, "policy", chunk_bytes=CHUNK)
    versions = {1: make_tensors(1)}
    writer.write(1, versions[1])
    mine = make_store("mine")
    fetcher = fetcher_of(node, mine, source)
    await fetcher.fetch()
    whole = fetcher.bytes_fetched
    for version in range(2, 8):
        versions[version] = nudged(versions[version - 1], version)
        change = writer.write(version, versions[version]).manifest.change
        assert change is not None and writer.size is not None and writer.size.num_changed == int(0.02 * 30_300)
        before = fetcher.bytes_fetched
        if version in (2, 3, 6, 7):  # 4 and 5 are missed, and 6 comes over them
            assert equal(await fetcher.fetch(), versions[version])
            assert fetcher.bytes_fetched - before < whole / 20 * (3 if version == 6 else 1)
    assert mine.versions("policy") == [1, 2, 3, 4, 5, 6, 7]

    late = fetcher_of(node, make_store("late"), source)
    assert equal(await late.fetch(), versions[7])
    assert late.bytes_fetched == fetcher.bytes_fetched, "the anchor and the changes after it"
    assert equal(await late.fetch(4), versions[4]) and late.bytes_fetched == fetcher.bytes_fetched
    assert equal(await late.fetch(7), versions[7])
    restarted = fetcher_of(node, make_store("late"), source)
    assert equal(await restarted.fetch(), versions[7]) and restarted.bytes_fetched == 0


async def test_an_anchor_beside_a_change(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    """When the changes outweigh the tensors, a version can be had both ways; each takes the shorter one."""
    writer = SnapshotWriter(source[1], learner, "policy", chunk_bytes=CHUNK)
    tensors = make_tensors(1)
    writer.write(1, tensors)
    fetcher = fetcher_of(node, make_store("mine"), source)
    await fetcher.fetch()
    version, change_bytes = 1, 0
    while True:
        version, tensors = version + 1, nudged(tensors, version, share=0.4)
        manifest = writer.write(version, tensors).manifest
        assert manifest.change is not None
        before = fetcher.bytes_fetched
        assert equal(await fetcher.fetch(), tensors)
        assert fetcher.bytes_fetched - before == manifest.change.num_bytes, "who holds the parent takes the change"
        change_bytes += manifest.change.num_bytes
        if manifest.is_anchor:
            break
    assert change_bytes > manifest.num_bytes and manifest.num_bytes == 100_608
    late = fetcher_of(node, make_store("late"), source)
    assert equal(await late.fetch(), tensors) and late.bytes_fetched == manifest.num_bytes
    writer.write(version + 1, nudged(tensors, 0))
    source[1].prune("policy", 1)
    assert source[1].versions("policy") == [version, version + 1]
    assert equal(await late.fetch(), nudged(tensors, 0))
    assert equal(await fetcher.fetch(), nudged(tensors, 0))


async def test_another_layout_needs_whole_tensors(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    writer = SnapshotWriter(source[1], learner, "policy", chunk_bytes=CHUNK)
    tensors = make_tensors(1)
    writer.write(1, tensors)
    fetcher = fetcher_of(node, make_store("mine"), source)
    await fetcher.fetch()
    fewer = {name: view for name, view in tensors.items() if name != "b"}
    assert writer.write(2, fewer).manifest.change is None
    assert equal(await fetcher.fetch(), fewer)
    writer.write(3, nudged(fewer, 3))
    assert equal(await fetcher.fetch(), nudged(fewer, 3))


async def test_a_change_that_does_not_give_its_tensor_is_not_loaded(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    """Signed by the learner, and wrong: what was held is dropped, and comes back whole."""
    writer = SnapshotWriter(source[1], learner, "policy", chunk_bytes=CHUNK)
    first = writer.write(1, make_tensors(1))
    fetcher = fetcher_of(node, make_store("mine"), source)
    await fetcher.fetch()
    second = writer.write(2, nudged(make_tensors(1), 2)).manifest
    assert second.change is not None
    for change in (
        msgspec.structs.replace(second.change, sizes=(0,) * 4, chunks=()),
        msgspec.structs.replace(
            second.change, sizes=(9, 0, 0, 0), chunks=(source[1].put_chunk(b"no change"),), chunk_bytes=CHUNK
        ),
    ):
        third = msgspec.structs.replace(second, version=3, parent=first.hash, change=change)
        source[1].put_manifest(sign_manifest(third, learner))
        with pytest.raises(RecordError, match="does not have the hash|change"):
            await fetcher.fetch(3)
        assert make_store("mine").versions("policy") == [1]
        assert equal(await fetcher.fetch(1), make_tensors(1))
        (source[1].directory / "manifests" / "policy" / f"{3:012d}").unlink()


async def test_late_joiner_takes_the_newest(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    for version in range(1, 6):
        publish(source, learner, version, make_tensors(version))
        source[1].prune("policy", 2)
    snapshot = await fetcher_of(node, make_store("mine"), source).fetch()
    assert snapshot.version == 5 and equal(snapshot, make_tensors(5))
    assert make_store("mine").latest("policy") == snapshot.published
    with pytest.raises(SnapshotGone):
        await fetcher_of(node, make_store("mine"), source).fetch(2)


async def test_store_keeps_the_newest_versions_only(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    mine = make_store("mine")
    fetcher = fetcher_of(node, mine, source, keep=2)
    for version in (1, 4, 9):
        publish(source, learner, version, make_tensors(version))
        await fetcher.fetch()
    assert mine.versions("policy") == [4, 9]


async def test_interrupted_fetch_continues(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 1, make_tensors(1))
    fetcher = fetcher_of(node, make_store("mine"), source)

    class Interrupt(RuntimeError):
        pass

    def stop_early(progress: Progress) -> None:
        if progress.bytes_done > 50_000:
            raise Interrupt

    with pytest.raises(Interrupt):
        await fetcher.fetch(on_progress=stop_early)
    assert make_store("mine").latest("policy") is None
    resumed = fetcher_of(node, make_store("mine"), source)
    assert equal(await resumed.fetch(), make_tensors(1))
    assert resumed.bytes_fetched < 60_000


async def test_what_came_of_a_version_that_never_came_whole_is_dropped(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 1, make_tensors(1))
    mine = make_store("mine")
    fetcher = fetcher_of(node, mine, source, keep=1)

    class Interrupt(RuntimeError):
        pass

    def stop_early(progress: Progress) -> None:
        if progress.bytes_done > 50_000:
            raise Interrupt

    with pytest.raises(Interrupt):
        await fetcher.fetch(on_progress=stop_early)
    publish(source, learner, 2, make_tensors(2))
    whole = (await fetcher.fetch()).published.manifest.whole
    assert whole is not None
    assert {path.name for path in (mine.directory / "chunks").glob("??/*")} == {d.hex() for d in whole.chunks}


async def test_announcement_reaches_subscribers(
    source: Source, node: Fabric, learner: Identity, make_tensors: MakeTensors
) -> None:
    async with announcements(node, source[0].identity.public_key, "policy") as versions:
        rogue_topic = f"node/{source[0].identity.node_id}/announce/policy"
        await node.publish(rogue_topic, b"999")
        publish(source, learner, 7, make_tensors(7))
        for _ in range(20):  # Best effort: a subscription takes a moment to be known.
            await source[2].announce("policy", 7)
            try:
                async with asyncio.timeout(0.25):
                    assert await anext(versions) == 7
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("no announcement came through")
    assert node.counters["publication_refused.stranger"] <= 1


def chain_of(*signed: SignedManifest) -> bytes:
    return encode(ChainPart(manifests=signed))


class Liar:
    """A node that serves a store but changes what it serves."""

    def __init__(self, fabric: Fabric, store: Store) -> None:
        self.fabric, self.store = fabric, store
        self.chain = b""
        self.spoil_chunks = 0

    async def start(self) -> None:
        prefix = f"node/{self.fabric.identity.node_id}"
        await self.fabric.serve(f"{prefix}/chunk/*", self.serve_chunk)
        await self.fabric.serve(f"{prefix}/chain/*/*/*", self.serve_chain)

    async def serve_chunk(self, request: Request) -> bytes:
        data = self.store.get_chunk(bytes.fromhex(request.key.rpartition("/")[2]))
        assert data is not None
        if self.spoil_chunks > 0:
            self.spoil_chunks -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    async def serve_chain(self, request: Request) -> bytes:
        return self.chain


@pytest.fixture
async def liar(source: Source, node: Fabric, learner: Identity, make_tensors: MakeTensors) -> Liar:
    publish(source, learner, 1, make_tensors(1))
    liar = Liar(node, source[1])
    latest = source[1].latest("policy")
    assert latest is not None
    liar.chain = chain_of(latest.signed)
    await liar.start()
    return liar


async def test_wrong_chunk_is_discarded_blamed_and_fetched_again(
    source: Source, liar: Liar, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    liar.spoil_chunks = MAX_BLAME - 1
    fetcher = Fetcher(source[0], make_store("mine"), [liar.fabric.identity.public_key])
    assert equal(await fetcher.fetch(), make_tensors(1))
    assert fetcher.blame[liar.fabric.identity.node_id] == MAX_BLAME - 1
    assert make_store("mine").num_damaged == 0


async def test_liar_is_left_for_an_honest_source(
    source: Source, liar: Liar, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    liar.spoil_chunks = 10**6
    async with await Fabric.connect(Identity.generate(), source[0].ticket("a run", bytes(16))) as node:
        sources = [liar.fabric.identity.public_key, source[0].identity.public_key]
        fetcher = Fetcher(node, make_store("mine"), sources)
        assert equal(await fetcher.fetch(), make_tensors(1))
    assert fetcher.blame[liar.fabric.identity.node_id] >= MAX_BLAME
    assert fetcher.blame[source[0].identity.node_id] == 0


async def test_liar_alone_ends_in_an_error_and_nothing_is_loaded(
    source: Source, liar: Liar, make_store: MakeStore
) -> None:
    liar.spoil_chunks = 10**6
    fetcher = Fetcher(source[0], make_store("mine"), [liar.fabric.identity.public_key])
    with pytest.raises(RecordError, match="not on the signed chain"):
        await fetcher.fetch()
    assert make_store("mine").latest("policy") is None
    assert not list((make_store("mine").directory / "chunks").glob("??/*"))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("bit", "should be|does not fit|another key|run"),
        ("signer", "another key"),
        ("run", "for run 'another run'"),
        ("model", "asked for"),
        ("garbage", "should be a ChainPart"),
    ],
)
async def test_false_manifests_are_refused(
    source: Source,
    liar: Liar,
    make_store: MakeStore,
    learner: Identity,
    make_tensors: MakeTensors,
    lie: str,
    reason: str,
) -> None:
    manifest = build_manifest("a run", "policy", 1, b"", make_tensors(1))
    if lie == "bit":
        liar.chain = liar.chain[:60] + bytes([liar.chain[60] ^ 1]) + liar.chain[61:]
    elif lie == "signer":
        liar.chain = chain_of(sign_manifest(manifest, Identity.generate()))
    elif lie == "run":
        other = build_manifest("another run", "policy", 1, b"", make_tensors(1))
        liar.chain = chain_of(sign_manifest(other, learner))
    elif lie == "model":
        other = build_manifest("a run", "drafter", 1, b"", make_tensors(1))
        liar.chain = chain_of(sign_manifest(other, learner))
    else:
        liar.chain = b"\x00garbage"
    fetcher = Fetcher(source[0], make_store("mine"), [liar.fabric.identity.public_key])
    with pytest.raises(RecordError, match=reason):
        await fetcher.fetch()
    assert fetcher.blame[liar.fabric.identity.node_id] == 1


async def test_old_version_replayed_as_newest_is_refused(
    source: Source, liar: Liar, make_store: MakeStore, learner: Identity, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 2, make_tensors(2))
    mine = make_store("mine")
    newest = source[1].latest("policy")
    assert newest is not None
    replayed, liar.chain = liar.chain, chain_of(newest.signed)
    fetcher = Fetcher(source[0], mine, [liar.fabric.identity.public_key])
    assert (await fetcher.fetch()).version == 2
    liar.chain = replayed
    with pytest.raises(RecordError, match="offers version 1 as the newest, but 2 is known"):
        await fetcher.fetch()
    restarted = Fetcher(source[0], make_store("mine"), [liar.fabric.identity.public_key])
    with pytest.raises(RecordError, match="but 2 is known"):
        await restarted.fetch()
    with pytest.raises(RecordError, match="asked for"):
        await restarted.fetch(3)


async def test_contradicting_manifest_is_not_loaded(
    source: Source, liar: Liar, make_store: MakeStore, learner: Identity
) -> None:
    """Chunks that are right and a tensor hash that is not: even the signer is not believed."""
    manifest = build_manifest("a run", "policy", 4, b"", {"w": view_of("U8", (4,), b"abcd")})
    source[1].put_chunk(b"abcd")
    entry = msgspec.structs.replace(manifest.tensors[0], hash=bytes(32))
    wrong = msgspec.structs.replace(manifest, tensors=(entry,))
    liar.chain = chain_of(sign_manifest(wrong, learner))
    fetcher = Fetcher(source[0], make_store("mine"), [liar.fabric.identity.public_key])
    with pytest.raises(RecordError, match="does not have the hash"):
        await fetcher.fetch()
    assert make_store("mine").latest("policy") is None


async def test_pruned_meanwhile(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 1, make_tensors(1))
    shutil.rmtree(source[1].directory / "chunks")
    with pytest.raises(SnapshotGone, match="no longer served"):
        await fetcher_of(node, make_store("mine"), source).fetch()


async def test_damage_on_the_own_disk_is_repaired(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 1, make_tensors(1))
    mine = make_store("mine")
    fetcher = fetcher_of(node, mine, source)
    whole = (await fetcher.fetch()).published.manifest.whole
    assert whole is not None
    chunk_file(mine, whole.chunks[3]).write_bytes(b"rotten")
    restarted = fetcher_of(node, make_store("mine"), source)
    assert equal(await restarted.fetch(), make_tensors(1)) and restarted.bytes_fetched == CHUNK


async def test_local_store_is_read_and_verified(
    source: Source, node: Fabric, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    publish(source, learner, 1, make_tensors(1))
    mine = make_store("mine")
    fetcher = fetcher_of(node, mine, source, local=source[1].directory)
    snapshot = await fetcher.fetch()
    assert equal(snapshot, make_tensors(1)) and fetcher.bytes_fetched == 0
    assert snapshot.published.manifest.whole is not None
    digest = snapshot.published.manifest.whole.chunks[0]
    shutil.copytree(source[1].directory, mine.directory.parent / "copy")
    (chunk := mine.directory.parent / "copy" / "chunks" / digest.hex()[:2] / digest.hex()).write_bytes(b"forged")
    other = fetcher_of(node, make_store("other"), source, local=mine.directory.parent / "copy")
    assert equal(await other.fetch(), make_tensors(1)) and other.bytes_fetched == 8192
    assert chunk.read_bytes() == b"forged"  # Another process's directory is only read.
    absent = fetcher_of(node, make_store("third"), source, local=mine.directory.parent / "nowhere")
    assert equal(await absent.fetch(), make_tensors(1)) and absent.bytes_fetched > 0


async def test_strangers_get_nothing(
    source: Source, learner: Identity, make_store: MakeStore, make_tensors: MakeTensors
) -> None:
    friend = Identity.generate()
    async with await Fabric.listen(Identity.generate()) as fabric:
        publisher = Publisher(fabric, source[1], allow=lambda key: key == friend.public_key)
        await publisher.start()
        publish(source, learner, 1, make_tensors(1))
        for identity in (friend, Identity.generate()):
            async with await Fabric.connect(identity, fabric.ticket("a run", bytes(16))) as node:
                fetcher = Fetcher(node, make_store(identity.node_id), [fabric.identity.public_key])
                if identity is friend:
                    assert equal(await fetcher.fetch(), make_tensors(1))
                else:
                    with pytest.raises(RemoteError, match="not been admitted"):
                        await fetcher.fetch()


async def test_hostile_keys(source: Source, node: Fabric) -> None:
    prefix, to = f"node/{source[0].identity.node_id}", source[0].identity.public_key
    for key in (
        "chunk/..",
        "chunk/00",
        "chunk/zz",
        "chain/policy/-1/none",
        "chain/../latest/none",
        "chain/policy/1/-1",
    ):
        with pytest.raises(RemoteError) as caught:
            await node.request(f"{prefix}/{key}", b"", 5.0, to=to)
        assert caught.value.kind == "refused"


@pytest.mark.slow
async def test_between_processes_and_death_of_the_source(make_store: MakeStore, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    command = [sys.executable, str(Path(__file__).with_name("serve_store.py")), str(tmp_path / "theirs")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)  # noqa: ASYNC220
    try:
        assert process.stdout is not None
        ticket = Ticket.decode(await asyncio.to_thread(process.stdout.readline))
        async with await Fabric.connect(Identity.generate(), ticket) as node:
            fetcher = Fetcher(node, make_store("mine"), [ticket.coordinator_key])
            snapshot = await fetcher.fetch()
            assert snapshot.version == 2
            assert bytes(snapshot.tensors["w"].data) == random.Random(2).randbytes(30_000_001)
            process.kill()
            with pytest.raises(NetworkError):
                await fetcher.fetch()
            assert fetcher.blame.total() == 0
    finally:
        process.kill()
        process.communicate()
