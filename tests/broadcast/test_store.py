"""The store: nothing half, nothing wrong, nothing lost that a kept version needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from tensors_made import nudged

import shoal
from shoal.broadcast.chain import build_manifest, sign_manifest
from shoal.broadcast.publisher import SnapshotWriter, write_snapshot
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import RecordError, StorageError
from shoal.fabric.identity import Identity

Tensors = dict[str, TensorView]
MakeStore = Callable[[str], Store]
MakeTensors = Callable[[int], Tensors]
CHUNK = 8192


def chunk_files(store: Store) -> list[Path]:
    return list((store.directory / "chunks").glob("??/*"))


def test_chunks_come_back(make_store: MakeStore) -> None:
    store = make_store("s")
    digest = store.put_chunk(b"hello")
    assert digest == blake3(b"hello").digest()
    assert store.has(digest) and store.get_chunk(digest) == b"hello"
    assert not store.has(bytes(32)) and store.get_chunk(bytes(32)) is None
    assert make_store("s").get_chunk(digest) == b"hello"


def test_damaged_chunk_is_as_if_absent(make_store: MakeStore) -> None:
    store = make_store("s")
    digest = store.put_chunk(b"hello")
    chunk_files(store)[0].write_bytes(b"hellp")
    reader = Store(store.directory, run=store.run, trusted_key=store.trusted_key, read_only=True)
    assert reader.get_chunk(digest) is None and chunk_files(store)
    assert store.get_chunk(digest) is None and store.num_damaged == 1 and not chunk_files(store)
    store.put_chunk(b"hello")
    assert store.get_chunk(digest) == b"hello"


def test_versions(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    assert store.latest("policy") is None and store.manifest("policy", 3) is None
    third = write_snapshot(store, learner, "policy", 3, make_tensors(3), chunk_bytes=CHUNK)
    fifth = write_snapshot(store, learner, "policy", 5, make_tensors(5), chunk_bytes=CHUNK)
    assert fifth.manifest.parent == third.hash and third.manifest.parent == b""
    assert store.latest("policy") == fifth and store.manifest("policy", 3) == third
    assert store.versions("policy") == [3, 5] and store.versions("drafter") == []
    with pytest.raises(RecordError, match="not newer"):
        write_snapshot(store, learner, "policy", 5, make_tensors(6))
    with pytest.raises(RecordError, match="another key"):
        write_snapshot(store, Identity.generate(), "policy", 6, make_tensors(6))
    assert store.latest("policy") == fifth


def test_conflicts_are_refused(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    first = write_snapshot(store, learner, "policy", 1, make_tensors(1))
    fork = build_manifest(store.run, "policy", 1, b"", {})
    with pytest.raises(RecordError, match="two different manifests"):
        store.put_manifest(sign_manifest(fork, learner))
    backwards = build_manifest(store.run, "policy", 0, first.hash, {})
    with pytest.raises(RecordError, match="does not follow"):
        store.put_manifest(sign_manifest(backwards, learner))


def test_manifest_needs_its_chunks(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    manifest = build_manifest(store.run, "policy", 1, b"", make_tensors(1), chunk_bytes=2**17)
    with pytest.raises(StorageError, match="lacks 1 chunks"):
        store.put_manifest(sign_manifest(manifest, learner))
    assert store.latest("policy") is None


@pytest.mark.parametrize("content", [b"", b"garbage", "other version"])
def test_damaged_manifest_is_as_if_absent(
    make_store: MakeStore, learner: Identity, make_tensors: MakeTensors, content: bytes | str
) -> None:
    store = make_store("s")
    first = write_snapshot(store, learner, "policy", 1, make_tensors(1))
    write_snapshot(store, learner, "policy", 2, make_tensors(2))
    files = sorted((store.directory / "manifests" / "policy").iterdir())
    files[1].write_bytes(files[0].read_bytes() if isinstance(content, str) else content)
    assert store.latest("policy") == first and store.num_damaged == 1


def test_unsafe_names(make_store: MakeStore) -> None:
    store = make_store("s")
    for model in ("..", "a/b", "", ".hidden", "x" * 65):
        with pytest.raises(RecordError):
            store.manifest(model, 1)
    with pytest.raises(RecordError):
        store.manifest("policy", 10**12)


def test_prune(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    for version in range(1, 5):
        write_snapshot(store, learner, "policy", version, make_tensors(version), chunk_bytes=CHUNK)
    drafter = write_snapshot(store, learner, "drafter", 1, make_tensors(99), chunk_bytes=CHUNK)
    unnamed = store.put_chunk(b"of a version that is being written")
    before = len(chunk_files(store))
    dropped = store.prune("policy", 2)
    assert dropped == before - len(chunk_files(store)) == 2 * 8  # The tail of the stream, which is alike, stays.
    assert store.versions("policy") == [3, 4] and store.has(unnamed)
    for model, version in (("policy", 3), ("policy", 4), ("drafter", 1)):
        kept = store.manifest(model, version)
        assert kept is not None
        assert all(store.get_chunk(digest) for body in kept.manifest.bodies for digest in body.chunks)
    assert store.latest("drafter") == drafter
    assert store.prune("policy", 2) == 0


WRITER = """
import random, sys, pathlib
from shoal.broadcast.publisher import write_snapshot
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import view_of
from shoal.fabric.identity import Identity
learner = Identity(b"learner".ljust(32))
store = Store(pathlib.Path(sys.argv[1]), run="a run", trusted_key=learner.public_key)
newest = store.latest("policy")
version = newest.manifest.version + 1 if newest else 1
print("ready", flush=True)
while True:
    data = random.Random(version).randbytes(300_000)
    write_snapshot(store, learner, "policy", version, {"w": view_of("U8", (300_000,), data)}, chunk_bytes=10_000)
    store.prune("policy", 3)
    print(version, flush=True)
    version += 1
"""


def test_prune_keeps_what_kept_versions_are_made_from(
    make_store: MakeStore, learner: Identity, make_tensors: MakeTensors
) -> None:
    """Version 1 is whole; 2 to 5 are changes, and the newest cannot be made without any of them."""
    store = make_store("s")
    writer = SnapshotWriter(store, learner, "policy", chunk_bytes=CHUNK)
    for version in range(1, 6):
        writer.write(version, nudged(make_tensors(1), version))
    assert [p.manifest.is_anchor for p in store.chain("policy", 5)] == [False, False, False, False, True]
    assert store.prune("policy", 1) == 0 and store.versions("policy") == [1, 2, 3, 4, 5]
    SnapshotWriter(store, learner, "policy", chunk_bytes=CHUNK).write(6, make_tensors(6))  # restarted: an anchor
    assert store.prune("policy", 2) == 0, "version 5 is kept, and needs all before it"
    assert store.prune("policy", 1) > 0 and store.versions("policy") == [6]
    newest = store.latest("policy")
    assert newest is not None and newest.manifest.parent and newest.manifest.change is None


def test_parts_of_a_chain(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    writer = SnapshotWriter(store, learner, "policy", chunk_bytes=CHUNK)
    for version in (2, 3, 5, 6):
        writer.write(version, nudged(make_tensors(1), version))

    def versions(version: int, **how: int) -> list[int]:
        return [p.manifest.version for p in store.chain("policy", version, **how)]

    assert versions(6) == [6, 5, 3, 2] and versions(5) == [5, 3, 2] and versions(2) == [2]
    assert versions(6, since=3) == [6, 5] and versions(6, since=6) == [6] and versions(6, since=0) == [6, 5, 3, 2]
    assert versions(6, limit=2) == [6, 5]
    assert versions(4) == versions(9) == [] == store.chain("drafter", 1)


def start_writer(directory: Path, code: str = WRITER) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_killed_writer_leaves_a_valid_store(make_store: MakeStore) -> None:
    store = make_store("s")
    last = 0
    for delay_s in (0.0, 0.004, 0.011, 0.03):
        process = start_writer(store.directory)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert int(process.stdout.readline()) == last + 1
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for version in store.versions("policy"):
            published = store.manifest("policy", version)
            assert published is not None
            for body in published.manifest.bodies:
                data = b"".join(store.get_chunk(digest) or b"" for digest in body.chunks)
                assert len(data) == body.num_bytes
        newest = store.latest("policy")
        assert newest is not None and newest.manifest.version > last
        last = newest.manifest.version
    assert store.num_damaged == 0


def test_full_disk_is_named(make_store: MakeStore) -> None:
    store = make_store("s")
    # A limit on file size fails a write in the same place as a full disk does, and needs no privileges.
    code = WRITER.replace(
        'print("ready", flush=True)', "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    )
    _, errors = start_writer(store.directory, code).communicate()
    assert "StorageError: no space left for snapshots in " + str(store.directory) in errors
    assert "bytes free" in errors and "keep fewer versions" in errors
    assert store.latest("policy") is None and not list((store.directory / "new").iterdir())


def test_a_disk_budget(tmp_path: Path, learner: Identity, make_tensors: MakeTensors) -> None:
    """Older versions go before the limit is passed; where the newest alone does not fit, that is said."""
    limit = 2 * 110_000

    def opened(max_bytes: float = limit) -> Store:
        return Store(tmp_path / "s", run="a run", trusted_key=learner.public_key, durable=False, max_bytes=max_bytes)

    def size() -> int:
        return sum(path.stat().st_size for path in chunk_files(store))

    store = opened()
    for version in range(1, 8):
        write_snapshot(store, learner, "policy", version, make_tensors(version), chunk_bytes=CHUNK)
        assert size() <= limit
        newest = store.latest("policy")
        assert newest is not None and newest.manifest.version == version
        assert all(store.get_chunk(digest) for body in newest.manifest.bodies for digest in body.chunks)
        if version == 4:
            store = opened()  # what lies there already counts
    assert len(store.versions("policy")) < 3
    with pytest.raises(StorageError, match="do not fit into the 1,000 bytes"):
        write_snapshot(opened(1000), learner, "policy", 8, make_tensors(8), chunk_bytes=CHUNK)


def test_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        Store(tmp_path / "file", run="a run", trusted_key=bytes(32))


def test_prune_beside_a_writer(make_store: MakeStore, learner: Identity, make_tensors: MakeTensors) -> None:
    store = make_store("s")
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            store.prune("policy", 1)

    pruner = threading.Thread(target=prune)
    pruner.start()
    try:
        for version in range(1, 15):
            write_snapshot(store, learner, "policy", version, make_tensors(version % 3), chunk_bytes=CHUNK)
            newest = store.latest("policy")
            assert newest is not None and newest.manifest.version == version
            assert all(store.get_chunk(digest) for body in newest.manifest.bodies for digest in body.chunks)
    finally:
        stop.set()
        pruner.join()
