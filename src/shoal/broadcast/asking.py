"""Chunks one by one through the fabric, from nodes that serve the chain: where there are no direct links, or they fail.

Several questions are under way at a time; each is asked again after a time that follows the link's rate (`reasking`).

The wait depends on progress: it ends in error only when no chunk arrived for as long as the slowest acceptable link
would need for what is in flight. Invariants: a chunk enters the store only after its hash was found right; a source
that sends wrong bytes is blamed, and left alone after `MAX_BLAME` of them; one that is busy is asked again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from blake3 import blake3

from shoal.broadcast.publisher import ChunkGone
from shoal.broadcast.reasking import AskTime
from shoal.broadcast.store import Store
from shoal.errors import NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.waits import waiting

log = logging.getLogger("shoal.broadcast")

CHUNKS_IN_FLIGHT = 24
"""Enough to fill a link of 200 Mb/s and 50 ms one way with chunks of 128 KiB."""

MIN_BYTES_PER_S = 64 * 1024
"""A slower link is taken for a dead one."""

PATIENCE_S = 10.0
"""Added to what the slowest link needs: the time in which a busy source recovers."""

BUSY_RETRY_S = 0.2
MAX_BLAME = 3


class SnapshotGone(NetworkError):
    """The version asked for is not, or no longer, served; ask for the newest."""


class Asking:
    """Questions of one node.

    Args:
        sources: public keys of nodes that serve the chain, in the order in which to ask them.
        blame: counts wrong chunks by node id.
        on_chunk: told the source and the bytes of each chunk that came.
    """

    def __init__(
        self,
        fabric: Fabric,
        store: Store,
        sources: Sequence[bytes],
        *,
        blame: Counter[str],
        on_chunk: Callable[[str, int], None],
    ) -> None:
        self._fabric = fabric
        self._store = store
        self._sources = list(sources)
        self._blame = blame
        self._on_chunk = on_chunk

    async def fetch(self, version: int, missing: Mapping[bytes, int]) -> None:
        """Bring chunks of a version, given with their sizes, into the store.

        Raises:
            SnapshotGone: no source has them any more.
            RecordError: the sources serve bytes that are not on the signed chain.
            NetworkError: no progress.
        """
        todo = asyncio.Queue[tuple[int, bytes, int]]()
        for number, (digest, size) in enumerate(missing.items(), start=1):
            todo.put_nowait((number, digest, size))
        clock = asyncio.get_running_loop().time
        ask_time = AskTime(CHUNKS_IN_FLIGHT, MIN_BYTES_PER_S, clock())

        async def work() -> None:
            while not todo.empty():
                number, digest, size = todo.get_nowait()
                what = f"chunk {number} of {len(missing)} of version {version}"
                source = await self._fetch_chunk(what, digest, size, ask_time)
                ask_time.arrived(size, clock())
                self._on_chunk(source, size)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CHUNKS_IN_FLIGHT, len(missing))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _fetch_chunk(self, what: str, digest: bytes, size: int, ask_time: AskTime) -> str:
        """Gives the id of who sent it."""
        # All chunks in flight share the link, so each may take as long as all of them together.
        patience_s = PATIENCE_S + CHUNKS_IN_FLIGHT * size / MIN_BYTES_PER_S
        deadline = asyncio.get_running_loop().time() + patience_s
        with waiting(what, whom=self._sources[0], deadline_s=patience_s, is_detail=True) as wait:
            return await self._take_from_any(wait, digest, size, deadline, ask_time)

    async def _take_from_any(self, wait: waiting, digest: bytes, size: int, deadline: float, ask_time: AskTime) -> str:
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
                    return node_id_of(source)
                except RecordError as error:
                    self._blame[node_id_of(source)] += 1
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
        return [source for source in self._sources if self._blame[node_id_of(source)] < MAX_BLAME]

    async def _take(self, source: bytes, digest: bytes, size: int, deadline_s: float) -> None:
        key = f"node/{node_id_of(source)}/chunk/{digest.hex()}"
        data = await self._fabric.request(key, b"", deadline_s, to=source, max_reply_bytes=size)
        if len(data) != size or await asyncio.to_thread(lambda: blake3(data).digest()) != digest:
            raise RecordError(f"bytes sent as chunk {digest.hex()[:16]}… have another hash.")
        await asyncio.to_thread(self._store.put_chunk, data, digest)
