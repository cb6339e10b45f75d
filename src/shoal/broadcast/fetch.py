"""The receiving side: the way from what is held to a version, the chunks that are missing, the tensors.

    chain of manifests ─▶ route ─▶ missing chunks, several at a time, each verified ─▶ store ─▶ tensors, verified

A fetcher keeps the tensors that it handed out last and turns them into the next version in place, by the changes
between; a node that holds nothing begins at whole bytes. Whichever way is shorter is taken.

Invariants: a chunk enters the store only after its hash was found right; tensors are handed out only when all are
here and each tensor's own hash is what the signed manifest says; a manifest offered as the newest is refused if a
newer one is known (an old one signed long ago stays old). What the store has already is not fetched again.

The wait depends on progress: a fetch ends in error only when no chunk arrived for as long as the slowest acceptable
link would need for what is in flight. A source that sends wrong bytes is blamed, and left alone after
`MAX_BLAME` of them; one that is busy is asked again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from shoal.broadcast.chain import Published, Route, check_chain, find_route, open_manifest
from shoal.broadcast.gather import Gathering
from shoal.broadcast.image import Image
from shoal.broadcast.peers import peers_of, source_only
from shoal.broadcast.publisher import LATEST, MAX_CHAIN_BYTES, NOTHING, ChunkGone
from shoal.broadcast.reasking import AskTime
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import NetworkError, RecordError, StorageError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.waits import waiting
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import ChainPart, Manifest, PeerList, PeerRecord

log = logging.getLogger("shoal.broadcast")

CHUNKS_IN_FLIGHT = 24
"""Enough to fill a link of 200 Mb/s and 50 ms one way with chunks of 128 KiB."""

MIN_BYTES_PER_S = 64 * 1024
"""A slower link is taken for a dead one."""

PATIENCE_S = 10.0
"""Added to what the slowest link needs: the time in which a busy source recovers."""

MANIFEST_DEADLINE_S = 30.0
BUSY_RETRY_S = 0.2
MAX_BLAME = 3
MAX_ANSWER_BYTES = MAX_CHAIN_BYTES + 2**20
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
    """Valid until the fetcher's next fetch, which turns them into another version."""

    @property
    def version(self) -> int:
        return self.published.manifest.version


class Fetcher:
    """Brings versions of one model into a store and out of it as tensors. One fetch at a time.

    Args:
        sources: public keys of nodes that serve the chain, in the order in which to ask them.
        local: a store's directory on this machine from which chunks may be read (and verified) instead of fetched.
        keep: versions kept in the store after a fetch.
        record: given, chunks are taken over direct links, from other nodes too; it says what this node can do.
        relay: passes on what is fetched; listens where `record` says.
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
        relay: Relay | None = None,
        record: PeerRecord | None = None,
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
        self._image = Image(self._chunk)
        self._relay = relay
        self._record = record
        self.received: Counter[str] = Counter()
        """Bytes that came over direct links, by node id of who sent them."""
        self.blame: Counter[str] = Counter()
        """Wrong chunks and manifests received, by node id of the source."""
        self.bytes_fetched = 0

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
        part, route = await self._find_route(version)
        for _ in range(MAX_ROUNDS):
            missing = await asyncio.to_thread(self._missing, route)
            if missing and self._record is not None:
                await self._gather(part[0].manifest, missing, on_progress)
                missing = await asyncio.to_thread(self._missing, route)
            if missing:
                await self._fetch_chunks(part[0].manifest.version, missing, on_progress)
            tensors = await asyncio.to_thread(self._image.become, part[0], route)
            if tensors is not None:
                await asyncio.to_thread(self._keep_snapshot, route)
                self._newest = max(self._newest, part[0].manifest.version)
                return Snapshot(part[0], tensors)
            # A chunk was damaged on a disk here: go on from as far as it went.
            found = find_route(part, self._image.published)
            if found is None:
                part, found = await self._find_route(version)
            route = found
        raise StorageError(
            f"chunks in {self._store.directory} are damaged as soon as they are written.", "Check the disk."
        )

    async def _find_route(self, version: int | None) -> tuple[list[Published], Route]:
        """The chain down from `version`, or from the newest that a source offers, and the way along it.

        Raises:
            SnapshotGone: no source has it.
            RecordError: what was offered is not on the signed chain, or is older than what is known already.
            NetworkError: no source answered.
        """
        failure: RecordError | NetworkError = SnapshotGone(
            f"no source offers {self._wanted(version)}.", "Wait for the learner to publish."
        )
        held = self._image.published
        for source in self._sources:
            # Where the chain does not lead back to what is held, the way begins at whole bytes.
            for since in [NOTHING] if held is None else [str(held.manifest.version), NOTHING]:
                try:
                    part = await self._ask_chain(source, version, since)
                    route = find_route(part, held) if part else None
                    if route is not None:
                        return part, route
                except RecordError as error:
                    self.blame[node_id_of(source)] += 1
                    failure = error
                except NetworkError as error:
                    failure = error
        raise failure

    async def _ask_chain(self, source: bytes, version: int | None, since: str) -> list[Published]:
        wanted = LATEST if version is None else version
        key = f"node/{node_id_of(source)}/chain/{self._model}/{wanted}/{since}"
        with waiting(
            f"the manifests of {self._wanted(version)}", whom=source, deadline_s=MANIFEST_DEADLINE_S, is_detail=True
        ):
            data = await self._fabric.request(
                key, b"", MANIFEST_DEADLINE_S, to=source, max_reply_bytes=MAX_ANSWER_BYTES
            )
        return await asyncio.to_thread(self._check_offer, data, version)

    def _wanted(self, version: int | None) -> str:
        return f"{self._model!r} version {'newest' if version is None else version}"

    def _check_offer(self, data: bytes, version: int | None) -> list[Published]:
        offer = decode(data, ChainPart, max_bytes=MAX_ANSWER_BYTES)
        part = [open_manifest(signed, self._store.trusted_key, self._store.run) for signed in offer.manifests]
        if not part:
            return part
        check_chain(part)
        offered = part[0].manifest
        if offered.model != self._model or (version is not None and offered.version != version):
            raise RecordError(
                f"asked for {self._wanted(version)}, a source offers {offered.model!r} version {offered.version}."
            )
        kept = self._store.latest(self._model)
        known = max(self._newest, kept.manifest.version if kept else -1)
        if version is None and offered.version < known:
            raise RecordError(f"a source offers version {offered.version} as the newest, but {known} is known.")
        if kept is not None and kept.manifest.version == offered.version and kept.hash != part[0].hash:
            raise RecordError(f"a source offers another version {offered.version} than the one kept here.")
        return part

    def _missing(self, route: Route) -> dict[bytes, int]:
        """Hashes of the chunks that are on no disk here, with their sizes, in the order of their use."""
        return {
            digest: size
            for body in route.bodies
            for digest, size in body.chunk_sizes()
            if not self._store.has(digest) and not self._has_locally(digest)
        }

    def _has_locally(self, digest: bytes) -> bool:
        return self._local is not None and digest not in self._bad_locally and self._local.has(digest)

    async def introduce(self) -> None:
        """Tell the source that this node is there, so that the next version is planned with it.

        Raises:
            NetworkError: it does not answer.
        """
        await self._ask_peers(NOTHING)

    async def _ask_peers(self, version: str) -> PeerList | None:
        """Those with whom a version is shared; `None` where the source wants chunks to be asked of itself."""
        assert self._record is not None
        source = self._sources[0]
        key = f"node/{node_id_of(source)}/peers/{self._model}/{version}"
        with waiting(f"the peers of version {version}", whom=source, deadline_s=MANIFEST_DEADLINE_S, is_detail=True):
            data = await self._fabric.request(key, encode(self._record), MANIFEST_DEADLINE_S, to=source)
        return decode(data, PeerList) if data else None

    async def _gather(
        self, target: Manifest, missing: dict[bytes, int], on_progress: Callable[[Progress], None] | None
    ) -> None:
        """Fetch over direct links what can be had so; whatever goes wrong there is left to `_fetch_chunks`."""
        try:
            listed = await self._ask_peers(str(target.version))
        except (NetworkError, RecordError) as error:
            log.warning("no peers are known: %s", error.problem)
            return
        if listed is None:
            return
        total, done = sum(missing.values()), 0

        def on_chunk(digest: bytes, data: bytes) -> None:
            nonlocal done
            done += len(data)
            self.bytes_fetched += len(data)
            if self._relay is not None:
                self._relay.arrived(digest, data)
            if on_progress is not None:
                on_progress(Progress(target.version, done, total))

        own = self._fabric.identity
        # All who follow the chain are fetching this one now; what else is missing only the source is sure to have.
        shared = dict((target.change or target.bodies[0]).chunk_sizes())
        alone = {digest: size for digest, size in missing.items() if digest not in shared}
        parts = [
            (alone, source_only(listed, own.public_key, len(alone))),
            (shared, peers_of(listed, own.public_key, len(shared))),
        ]
        for sizes, peers in parts:
            if not sizes.keys() & missing.keys():
                continue
            try:
                with waiting(f"the chunks of version {target.version}", whom=self._sources[0], is_detail=True):
                    await Gathering(
                        own, self._store, sizes, peers, on_chunk, blame=self.blame, received=self.received
                    ).run()
            except NetworkError as error:
                log.warning("version %d is asked of its source alone: %s", target.version, error.problem)

    async def _fetch_chunks(
        self, version: int, missing: dict[bytes, int], on_progress: Callable[[Progress], None] | None
    ) -> None:
        todo = asyncio.Queue[tuple[int, bytes, int]]()
        for number, (digest, size) in enumerate(missing.items(), start=1):
            todo.put_nowait((number, digest, size))
        total, done = sum(missing.values()), 0
        clock = asyncio.get_running_loop().time
        ask_time = AskTime(CHUNKS_IN_FLIGHT, MIN_BYTES_PER_S, clock())

        async def work() -> None:
            nonlocal done
            while not todo.empty():
                number, digest, size = todo.get_nowait()
                what = f"chunk {number} of {len(missing)} of version {version}"
                await self._fetch_chunk(what, digest, size, ask_time)
                ask_time.arrived(size, clock())
                done += size
                if on_progress is not None:
                    on_progress(Progress(version, done, total))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CHUNKS_IN_FLIGHT, len(missing))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _fetch_chunk(self, what: str, digest: bytes, size: int, ask_time: AskTime) -> None:
        # All chunks in flight share the link, so each may take as long as all of them together.
        patience_s = PATIENCE_S + CHUNKS_IN_FLIGHT * size / MIN_BYTES_PER_S
        deadline = asyncio.get_running_loop().time() + patience_s
        with waiting(what, whom=self._sources[0], deadline_s=patience_s, is_detail=True) as wait:
            await self._take_from_any(wait, digest, size, deadline, ask_time)

    async def _take_from_any(self, wait: waiting, digest: bytes, size: int, deadline: float, ask_time: AskTime) -> None:
        loop = asyncio.get_running_loop()
        failure: RecordError | NetworkError = NetworkError("no source is left.")
        while (remaining := deadline - loop.time()) > 0:
            sources = self._trusted_sources()
            num_gone = 0
            for source in sources:
                wait.whom = source
                patience_s = min(max(1.0, remaining / len(sources)), ask_time.seconds(size))
                asked_at = loop.time()
                try:
                    await self._take(source, digest, size, patience_s)
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
                    if loop.time() - asked_at >= patience_s:
                        ask_time.late(size, loop.time())
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
        data = await self._fabric.request(key, b"", deadline_s, to=source, max_reply_bytes=size)
        if len(data) != size or await asyncio.to_thread(lambda: blake3(data).digest()) != digest:
            raise RecordError(f"bytes sent as chunk {digest.hex()[:16]}… have another hash.")
        await asyncio.to_thread(self._store.put_chunk, data, digest)
        self.bytes_fetched += size

    def _chunk(self, digest: bytes) -> bytes | None:
        chunk = self._store.get_chunk(digest)
        if chunk is None and self._local is not None:
            chunk = self._local.get_chunk(digest)
            if chunk is None:
                self._bad_locally.add(digest)  # Fetched in the next round.
        return chunk

    def _keep_snapshot(self, route: Route) -> None:
        # What was read from the local store is not copied, so its manifest is not kept here either.
        for published in route.versions:
            if any(self._store.has_body(body) for body in published.manifest.bodies):
                self._store.put_manifest(published.signed)
        self._store.prune(self._model, self._keep)
