"""The receiving side: the chunks that are missing, several at a time, each verified, until the snapshot is whole.

Invariants: a chunk enters the store only after its hash was found right; tensors are handed out only when all are
here and each tensor's own hash is right; a manifest offered as the newest is refused if a newer one is known (an old
one signed long ago stays old). What an earlier version left in the store is not fetched again.

The wait depends on progress: a fetch ends in error only when no chunk arrived for as long as the slowest acceptable
link would need for what is in flight. A source that sends wrong bytes is blamed, and left alone after
`MAX_BLAME` of them; one that is busy is asked again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from shoal.broadcast.chain import Published, open_manifest
from shoal.broadcast.publisher import LATEST, ChunkGone
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView, view_of
from shoal.errors import NetworkError, RecordError, StorageError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.protocol.codec import decode
from shoal.protocol.snapshot import MAX_CHUNK_BYTES, Manifest, SignedManifest

log = logging.getLogger("shoal.broadcast")

CHUNKS_IN_FLIGHT = 4
"""Enough to fill a link of 200 Mb/s and 50 ms with chunks of 4 MiB many times over."""

MIN_BYTES_PER_S = 64 * 1024
"""A slower link is taken for a dead one."""

PATIENCE_S = 10.0
"""Added to what the slowest link needs: the time in which a busy source recovers."""

MANIFEST_DEADLINE_S = 30.0
BUSY_RETRY_S = 0.2
MAX_BLAME = 3
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_ROUNDS = 3
"""Times that chunks are fetched again after they turned out damaged on this node's own disk."""


class SnapshotGone(NetworkError):
    """The version asked for is not, or no longer, served; ask for the newest."""


class Progress(NamedTuple):
    """How far a fetch has come, in bytes that had to be fetched."""

    version: int
    bytes_done: int
    bytes_total: int


class Snapshot(NamedTuple):
    """One whole, verified version."""

    published: Published
    tensors: dict[str, TensorView]

    @property
    def version(self) -> int:
        return self.published.manifest.version


class Fetcher:
    """Brings versions of one model into a store and out of it as tensors. One fetch at a time.

    Args:
        sources: public keys of nodes that serve the chain, in the order in which to ask them.
        local: a store's directory on this machine from which chunks may be read (and verified) instead of fetched.
        keep: versions kept in the store after a fetch.
    """

    def __init__(
        self,
        fabric: Fabric,
        store: Store,
        sources: Sequence[bytes],
        model: str = "policy",
        *,
        local: Path | None = None,
        keep: int = 2,
    ) -> None:
        assert sources
        self._fabric = fabric
        self._store = store
        self._sources = list(sources)
        self._model = model
        self._local = (
            None if local is None else Store(local, run=store.run, trusted_key=store.trusted_key, read_only=True)
        )
        self._bad_locally: set[bytes] = set()
        self._keep = keep
        self._newest = -1
        self.blame: Counter[str] = Counter()
        """Wrong chunks and manifests received, by node id of the source."""
        self.bytes_fetched = 0

    async def manifest(self, version: int | None = None) -> Published:
        """The manifest of `version`, or of the newest one that a source offers.

        Raises:
            SnapshotGone: no source has it.
            RecordError: what was offered is not on the signed chain, or is older than what is known already.
            NetworkError: no source answered.
        """
        failure: RecordError | NetworkError = SnapshotGone(
            f"no source offers {self._wanted(version)}.", "Wait for the learner to publish."
        )
        for source in self._sources:
            key = f"node/{node_id_of(source)}/manifest/{self._model}/{LATEST if version is None else version}"
            try:
                data = await self._fabric.request(
                    key, b"", MANIFEST_DEADLINE_S, to=source, max_reply_bytes=MAX_MANIFEST_BYTES
                )
                if data:
                    return await asyncio.to_thread(self._check_offer, data, version)
            except RecordError as error:
                self.blame[node_id_of(source)] += 1
                failure = error
            except NetworkError as error:
                failure = error
        raise failure

    async def fetch(
        self, version: int | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Snapshot:
        """Bring `version` (by default the newest) here and return its tensors.

        Raises:
            SnapshotGone: it is not served, or was pruned at the source meanwhile.
            RecordError: the sources serve bytes that are not on the signed chain.
            NetworkError: no progress.
            StorageError: this node's disk is full or faulty.
        """
        published = await self.manifest(version)
        for _ in range(MAX_ROUNDS):
            missing = await asyncio.to_thread(self._missing, published.manifest)
            if missing:
                await self._fetch_chunks(published.manifest.version, missing, on_progress)
            snapshot = await asyncio.to_thread(self._assemble, published)
            if snapshot is not None:
                await asyncio.to_thread(self._keep_snapshot, published)
                self._newest = max(self._newest, snapshot.version)
                return snapshot
        raise StorageError(
            f"chunks in {self._store.directory} are damaged as soon as they are written.", "Check the disk."
        )

    def _wanted(self, version: int | None) -> str:
        return f"{self._model!r} version {'newest' if version is None else version}"

    def _check_offer(self, data: bytes, version: int | None) -> Published:
        published = open_manifest(decode(data, SignedManifest), self._store.trusted_key, self._store.run)
        offered = published.manifest
        if offered.model != self._model or (version is not None and offered.version != version):
            raise RecordError(
                f"asked for {self._wanted(version)}, a source offers {offered.model!r} version {offered.version}."
            )
        kept = self._store.latest(self._model)
        known = max(self._newest, kept.manifest.version if kept else -1)
        if version is None and offered.version < known:
            raise RecordError(f"a source offers version {offered.version} as the newest, but {known} is known.")
        if kept is not None and kept.manifest.version == offered.version and kept.hash != published.hash:
            raise RecordError(f"a source offers another version {offered.version} than the one kept here.")
        return published

    def _missing(self, manifest: Manifest) -> dict[bytes, int]:
        """Hashes of the chunks that are on no disk here, with their sizes."""
        missing: dict[bytes, int] = {}
        for entry in manifest.tensors:
            for index, digest in enumerate(entry.chunks):
                if not self._store.has(digest) and not self._has_locally(digest):
                    missing[digest] = min(entry.chunk_bytes, entry.num_bytes - index * entry.chunk_bytes)
        return missing

    def _has_locally(self, digest: bytes) -> bool:
        return self._local is not None and digest not in self._bad_locally and self._local.has(digest)

    async def _fetch_chunks(
        self, version: int, missing: dict[bytes, int], on_progress: Callable[[Progress], None] | None
    ) -> None:
        todo = asyncio.Queue[tuple[bytes, int]]()
        for item in missing.items():
            todo.put_nowait(item)
        total, done = sum(missing.values()), 0

        async def work() -> None:
            nonlocal done
            while not todo.empty():
                digest, size = todo.get_nowait()
                await self._fetch_chunk(digest, size)
                done += size
                if on_progress is not None:
                    on_progress(Progress(version, done, total))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CHUNKS_IN_FLIGHT, len(missing))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _fetch_chunk(self, digest: bytes, size: int) -> None:
        # All chunks in flight share the link, so each may take as long as all of them together.
        patience_s = PATIENCE_S + CHUNKS_IN_FLIGHT * MAX_CHUNK_BYTES / MIN_BYTES_PER_S * (size / MAX_CHUNK_BYTES)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        failure: RecordError | NetworkError = NetworkError("no source is left.")
        while (remaining := deadline - loop.time()) > 0:
            sources = self._trusted_sources()
            num_gone = 0
            for source in sources:
                try:
                    await self._take(source, digest, size, max(1.0, remaining / len(sources)))
                    return
                except RecordError as error:
                    self.blame[node_id_of(source)] += 1
                    log.warning("node %s sent a wrong chunk: %s", node_id_of(source), error.problem)
                    failure = error
                except RemoteError as error:
                    num_gone += error.error_type == ChunkGone.__name__
                    failure = error
                except NetworkError as error:
                    failure = error
            if not sources:
                raise RecordError(
                    "every source sent bytes that are not on the signed chain.", "Ask for a fresh ticket."
                )
            if num_gone == len(sources):
                raise SnapshotGone("the snapshot is no longer served: its chunks are gone.", "Fetch the newest.")
            await asyncio.sleep(BUSY_RETRY_S)
        raise failure

    def _trusted_sources(self) -> list[bytes]:
        return [source for source in self._sources if self.blame[node_id_of(source)] < MAX_BLAME]

    async def _take(self, source: bytes, digest: bytes, size: int, deadline_s: float) -> None:
        key = f"node/{node_id_of(source)}/chunk/{digest.hex()}"
        data = await self._fabric.request(key, b"", deadline_s, to=source, max_reply_bytes=MAX_CHUNK_BYTES)
        if len(data) != size or await asyncio.to_thread(lambda: blake3(data).digest()) != digest:
            raise RecordError(f"bytes sent as chunk {digest.hex()[:16]}… have another hash.")
        await asyncio.to_thread(self._store.put_chunk, data, digest)
        self.bytes_fetched += size

    def _assemble(self, published: Published) -> Snapshot | None:
        """All tensors, or `None` if a chunk turned out damaged or gone."""
        tensors: dict[str, TensorView] = {}
        for entry in published.manifest.tensors:
            data = self._join(entry.num_bytes, entry.chunks)
            if data is None:
                return None
            if blake3(data).digest() != entry.hash:
                # Every chunk was right, so the signed manifest contradicts itself.
                raise RecordError(f"tensor {entry.name!r} does not have the hash that its manifest gives.")
            tensors[entry.name] = view_of(entry.dtype, entry.shape, data)
        return Snapshot(published, tensors)

    def _join(self, num_bytes: int, digests: Iterable[bytes]) -> bytearray | None:
        data, position = bytearray(num_bytes), 0
        for digest in digests:
            chunk = self._store.get_chunk(digest)
            if chunk is None and self._local is not None:
                chunk = self._local.get_chunk(digest)
                if chunk is None:
                    self._bad_locally.add(digest)  # Fetched in the next round.
            if chunk is None or position + len(chunk) > num_bytes:
                return None
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return data if position == num_bytes else None

    def _keep_snapshot(self, published: Published) -> None:
        # What was read from the local store is not copied, so its manifest is not kept here either.
        if all(self._store.has(digest) for entry in published.manifest.tensors for digest in entry.chunks):
            self._store.put_manifest(published.signed)
            self._store.prune(self._model, self._keep)
