"""Comparing notes: two nodes find out what each of them lacks, and hand it over.

    asker                                            answerer
    summary                            ──▶           the same? nothing : its digest
    digest, what the answerer lacks    ──▶           what the asker lacks, its digest if something is left
    … until neither lacks anything, or nothing more is taken

Invariants: an answer is believed only from the node that was asked; one exchange has a deadline and a bounded number
of rounds, each of bounded size; it ends also where one side refuses what the other gives. Senders are rationed, and
those to whom nobody granted anything may bring a few records only: each costs a signature check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from shoal.errors import NetworkError
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request, Service
from shoal.protocol.codec import decode, encode
from shoal.protocol.roster import Bundle, SyncReply, SyncRequest
from shoal.swarm.roster import Roster

MAX_SYNC_BYTES = 4 * 2**20
MAX_SYNC_RECORDS = 192
"""Records in one round: with their grants and a few proofs below `MAX_SYNC_BYTES`."""

MAX_ROUNDS = 24
"""Rounds in a row, where one does not hold everything: enough for a full roster."""

STRANGER_RECORDS = 4
"""Records taken at once from a node without a grant: its own, if its grant came with it, and little else."""

ABSENT_GRACE_S = 0.2
"""A node that does not serve yet is asked again another time."""


def sync_key(prefix: str, node_id: str) -> str:
    """Where the node with this id compares notes."""
    return f"{prefix}/sync/{node_id}"


class Exchange:
    """One node's side of all its exchanges, asked and answered."""

    def __init__(
        self,
        fabric: Fabric,
        roster: Roster,
        prefix: str,
        *,
        take: Callable[[Bundle], Awaitable[None]],
        ration: Callable[[bytes], bool],
        clock: Callable[[], float],
        deadline_s: float,
    ) -> None:
        """
        Args:
            take: takes in what came.
            ration: whether the sender with this public key may ask once more.
            clock: Unix seconds.
        """
        self._fabric = fabric
        self._roster = roster
        self._prefix = prefix
        self._take = take
        self._ration = ration
        self._clock = clock
        self._deadline_s = deadline_s

    async def serve(self, allow: Callable[[bytes], bool]) -> Service:
        """Answer those who compare notes with this node."""
        key = sync_key(self._prefix, self._fabric.identity.node_id)
        return await self._fabric.serve(
            key, self._answer, max_bytes=MAX_SYNC_BYTES, concurrency=4, backlog=32, allow=allow
        )

    async def with_node(self, node_id: str, deep: bool) -> None:
        """Compare notes with one node.

        Args:
            deep: compare whole windows also where the newest records agree, which finds forks that were moved on from.

        Raises:
            NetworkError, TimeoutError: it does not answer, refuses, or is too slow.
            RecordError: it sends what cannot be read.
        """
        async with asyncio.timeout(self._deadline_s):
            now = self._clock()
            digest = self._roster.digest(now) if deep else None
            given = Bundle()
            reply = await self._ask(node_id, SyncRequest(summary=self._roster.summary(now), digest=digest))
            for _ in range(MAX_ROUNDS):
                revision = self._roster.revision
                await self._take(reply.bundle)
                if reply.digest is None:
                    return
                now = self._clock()
                lacking = self._roster.missing(reply.digest, now, MAX_SYNC_RECORDS)
                full = len(reply.bundle.records) >= MAX_SYNC_RECORDS
                # What was given and is still lacking is refused there, as what changes nothing here is refused here.
                progress = lacking != given or self._roster.revision != revision
                if digest is not None and not (progress and (full or lacking != Bundle())):
                    return
                digest, given = self._roster.digest(now, deep=deep), lacking
                summary = self._roster.summary(now)
                reply = await self._ask(node_id, SyncRequest(summary=summary, digest=digest, bundle=lacking))

    async def _ask(self, node_id: str, request: SyncRequest) -> SyncReply:
        answer = await self._fabric.ask(
            sync_key(self._prefix, node_id),
            encode(request),
            self._deadline_s,
            max_reply_bytes=MAX_SYNC_BYTES,
            absent_grace_s=ABSENT_GRACE_S,
        )
        if answer.sender != node_id:
            raise NetworkError(f"node {answer.sender} answers for node {node_id}.")
        return decode(answer.body, SyncReply, max_bytes=MAX_SYNC_BYTES)

    async def _answer(self, request: Request) -> bytes:
        if not self._ration(request.sender_key):
            raise NetworkError("this node was asked too often.", "Ask less often.")
        sync = decode(request.body, SyncRequest, max_bytes=MAX_SYNC_BYTES)
        await self._take(self._affordable(sync.bundle, request.sender_key))
        now = self._clock()
        differs = sync.summary != self._roster.summary(now)
        reply = SyncReply(
            digest=self._roster.digest(now, deep=False) if differs else None,
            bundle=Bundle() if sync.digest is None else self._roster.missing(sync.digest, now, MAX_SYNC_RECORDS),
        )
        return encode(reply)

    def _affordable(self, bundle: Bundle, sender: bytes) -> Bundle:
        if self._roster.grants.is_granted(sender, self._clock()):
            return bundle
        return msgspec.structs.replace(
            bundle,
            records=bundle.records[:STRANGER_RECORDS],
            grants=bundle.grants[:STRANGER_RECORDS],
            evidence=bundle.evidence[:STRANGER_RECORDS],
        )
