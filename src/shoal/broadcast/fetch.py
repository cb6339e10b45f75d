"""The receiving side: the way from what is held to a version, the chunks that are missing, the tensors.

    chain of manifests ─▶ route ─▶ missing chunks, over links from many (`gather`) or through the fabric (`asking`)
                                         └─▶ store ─▶ tensors, verified (`image`)

A fetcher keeps the tensors that it handed out last and turns them into the next version in place, by the changes
between; a node that holds nothing begins at whole bytes. Whichever way is shorter is taken. A node that holds some
tensors only (layers of a pipeline's stage) fetches the chunks that have bytes of these.

Invariants: a chunk enters the store only after its hash was found right; tensors are handed out only when all are
here and each tensor's own hash is what the signed manifest says; a manifest offered as the newest is refused if a
newer one is known (an old one signed long ago stays old). What the store has already is not fetched again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from shoal.broadcast.asking import MAX_BLAME, Asking, SnapshotGone
from shoal.broadcast.chain import Holds, Published, Route, check_chain, chunks_for, find_route, open_manifest
from shoal.broadcast.gather import Gathering
from shoal.broadcast.image import Image
from shoal.broadcast.peers import holders_of, peers_of
from shoal.broadcast.pool import LinkPool
from shoal.broadcast.publisher import LATEST, MAX_CHAIN_BYTES, NOTHING
from shoal.broadcast.relay import Relay
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.errors import NetworkError, RecordError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.waits import waiting
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import ChainPart, Manifest, PeerList, PeerRecord

__all__ = ["MAX_BLAME", "Arrival", "Fetcher", "Progress", "Snapshot", "SnapshotGone"]

log = logging.getLogger("shoal.broadcast")

MANIFEST_DEADLINE_S = 30.0
ASK_ATTEMPTS, ASK_AGAIN_S = 3, 0.3
"""Questions for the peers of a version, and the wait after the first that failed."""

MAX_ANSWER_BYTES = MAX_CHAIN_BYTES + 2**20
MAX_ROUNDS = 3
"""Times that chunks are fetched again after they turned out damaged on this node's own disk."""


class Progress(NamedTuple):
    """How far a fetch has come, in bytes that had to be fetched."""

    version: int
    bytes_done: int
    bytes_total: int


class Arrival(NamedTuple):
    """How a version came here."""

    seconds: float
    """From the question to verified tensors."""
    by_source: dict[str, int]
    """Bytes by node id of who sent them."""


class Snapshot(NamedTuple):
    """One whole, verified version."""

    published: Published
    tensors: dict[str, TensorView]
    """Valid until the fetcher's next fetch, which turns them into another version."""
    arrival: Arrival

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
        holds: which tensors this node wants, by name; by default all. A node that wants some passes nothing on.
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
        holds: Holds | None = None,
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
        self._asked_for: set[bytes] = set()
        """Chunks that were missing since a version last came whole, and of that one."""
        self._keep = keep
        self._newest = -1
        self._image = Image(self._chunk, holds)
        self._relay = relay
        self._record = record if record is None or holds is None else replace(record, host="", port=0)
        self._holds = holds
        self._links = LinkPool(fabric.identity)
        self._whole = -1
        """The version whose whole bytes are in the store."""
        self.received: Counter[str] = Counter()
        """Bytes by node id of who sent them."""
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
        loop = asyncio.get_running_loop()
        started, before = loop.time(), Counter(self.received)
        part, route = await self._find_route(version)
        for _ in range(MAX_ROUNDS):
            missing = await asyncio.to_thread(self._missing, route)
            self._asked_for.update(missing)
            if missing and self._record is not None:
                await self._gather(part[0].manifest, route.begin, missing, on_progress)
                missing = await asyncio.to_thread(self._missing, route)
            if missing:
                await self._ask_for(part[0].manifest.version, missing, on_progress)
            tensors = await asyncio.to_thread(self._image.become, part[0], route)
            if tensors is not None:
                await asyncio.to_thread(self._keep_snapshot, route)
                self._newest = max(self._newest, part[0].manifest.version)
                return Snapshot(part[0], tensors, Arrival(loop.time() - started, dict(self.received - before)))
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
            for published, body in route.bodies
            for digest, size in chunks_for(published.manifest, body, self._holds)
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
            record = self._record
            if self._relay is not None and record.host:
                record = replace(self._relay.describe(record), whole=self._whole)
            data = await self._fabric.request(key, encode(record), MANIFEST_DEADLINE_S, to=source)
        return decode(data, PeerList) if data else None

    async def _ask_peers_again(self, version: str) -> PeerList | None:
        """As `_ask_peers`, several times where the source is busy: without peers, all chunks come from it alone."""
        for attempt in range(1, ASK_ATTEMPTS + 1):
            try:
                return await self._ask_peers(version)
            except (NetworkError, RecordError) as error:
                log.info("no peers are known yet: %s", error.problem)
                await asyncio.sleep(ASK_AGAIN_S * attempt)
        log.warning("version %s is asked of its source alone: no peers are known", version)
        return None

    async def _gather(
        self,
        target: Manifest,
        begin: Published | None,
        missing: dict[bytes, int],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        """Fetch over direct links what can be had so; whatever goes wrong there is left to `_ask_for`."""
        listed = await self._ask_peers_again(str(target.version))
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
        # All who follow the chain are fetching this one now; what else is missing they may have.
        shared = dict((target.change or target.bodies[0]).chunk_sizes())
        alone = {digest: size for digest, size in missing.items() if digest not in shared}
        parts = [
            (alone, holders_of(listed, own.public_key, len(alone), begin and begin.manifest.version)),
            (shared, peers_of(listed, own.public_key, len(shared))),
        ]
        for sizes, peers in parts:
            if not sizes.keys() & missing.keys():
                continue
            try:
                with waiting(f"the chunks of version {target.version}", whom=self._sources[0], is_detail=True):
                    await Gathering(
                        self._links,
                        self._store,
                        sizes,
                        peers,
                        on_chunk,
                        blame=self.blame,
                        received=self.received,
                        wanted=missing,
                    ).run()
            except NetworkError as error:
                log.warning("version %d is asked of its source alone: %s", target.version, error.problem)

    async def _ask_for(
        self, version: int, missing: dict[bytes, int], on_progress: Callable[[Progress], None] | None
    ) -> None:
        total, done = sum(missing.values()), 0

        def on_chunk(source: str, size: int) -> None:
            nonlocal done
            done += size
            self.bytes_fetched += size
            self.received[source] += size
            if on_progress is not None:
                on_progress(Progress(version, done, total))

        asking = Asking(self._fabric, self._store, self._sources, blame=self.blame, on_chunk=on_chunk)
        await asking.fetch(version, missing)

    def close(self) -> None:
        """End the links that are kept open for the next fetch."""
        self._links.close()

    def _chunk(self, digest: bytes) -> bytes | None:
        chunk = self._store.get_chunk(digest)
        if chunk is None and self._local is not None:
            chunk = self._local.get_chunk(digest)
            if chunk is None:
                self._bad_locally.add(digest)  # Fetched in the next round.
        return chunk

    def _keep_snapshot(self, route: Route) -> None:
        # What came of versions that never came whole would otherwise stay for ever.
        wanted = {d for published, body in route.bodies for d, _ in chunks_for(published.manifest, body, self._holds)}
        self._store.abandon(self._asked_for - wanted)
        self._asked_for &= wanted
        # What was read from the local store is not copied, so its manifest is not kept here either.
        for published in route.versions:
            for body in published.manifest.bodies:
                needed = [digest for digest, _ in chunks_for(published.manifest, body, self._holds)]
                if all(self._store.has(digest) for digest in needed):
                    self._store.put_manifest(published.signed, needed=needed)
                    break
        self._store.prune(self._model, self._keep)
        if route.begin is not None and self._local is None and self._holds is None:
            self._whole = route.begin.manifest.version
        if self._whole not in self._store.versions(self._model):
            self._whole = -1
