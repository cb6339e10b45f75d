"""What a server asks a stage by request: its delays to others, to take layers, to fetch weights ahead of time."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shoal.errors import NetworkError, RecordError, ShoalError
from shoal.fabric.fabric import Fabric
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.stage import Assigned, Assignment, DelayReply, DelayRequest, PrepareRequest
from shoal.protocol.work import Ack
from shoal.serving.layers import Peer

log = logging.getLogger("shoal.pipeline")

LOAD_S = 900.0
"""The longest that fetching and loading layers may take; a stage that dies meanwhile is noticed at once."""

DELAYS_S = 15.0
"""The longest that a newcomer may take to measure its delays to the others."""

SMALL_BYTES = 64 * 2**10


async def delays(fabric: Fabric, peer: Peer, others: Sequence[Peer]) -> tuple[float, ...]:
    """One-way seconds from a stage to each of the others, which have made offers; nothing where it can't say."""
    request = DelayRequest(addresses=tuple(other.offer.address for other in others if other.offer is not None))
    try:
        data = await fabric.request(f"node/{peer.node_id}/delays", encode(request), DELAYS_S, to=peer.key)
        return decode(data, DelayReply, max_bytes=SMALL_BYTES).delays_s
    except (NetworkError, RecordError) as error:
        log.info("stage %s measured no delays: %s", peer.name, error)
        return ()


async def assign(fabric: Fabric, peer: Peer, part: Assignment) -> ShoalError | None:
    """Have it take these layers; why it did not."""
    return await _ask(fabric, peer, "assign", part, Assigned)


async def prepare(fabric: Fabric, peer: Peer, version: int) -> None:
    """Have it fetch its layers of other weights; where it can't, it does so when it is given layers."""
    if (error := await _ask(fabric, peer, "prepare", PrepareRequest(version), Ack)) is not None:
        log.info("stage %s has not fetched version %d ahead of time: %s", peer.name, version, error)


async def _ask(fabric: Fabric, peer: Peer, verb: str, what: Record, answer: type[Record]) -> ShoalError | None:
    try:
        data = await fabric.request(f"node/{peer.node_id}/{verb}", encode(what), LOAD_S, to=peer.key)
        decode(data, answer, max_bytes=SMALL_BYTES)
    except (NetworkError, RecordError) as error:
        return error
    return None
