"""What lies between this node and others, measured: delay by a few pings, rates by a few timed transfers.

    delay     median of `PINGS` signed requests of a few bytes, after one that warms the path
    rate      bytes / (seconds − delay), sizes doubling until one takes `LONG_ENOUGH_S` or `MAX_PROBE_BYTES` are reached

Invariants: one measurement sends at most twice `MAX_PROBE_BYTES` each way and keeps its deadlines; a node serves few
bulk probes at a time and to those alone whom `allow` admits, so that nobody is made to send for free. Numbers are of
the path the fabric uses, relays included, at that moment, with whatever else runs.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from shoal.errors import NetworkError, RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request
from shoal.protocol.roster import MAX_DELAY_S, MAX_DELAYS

PINGS = 3
PING_DEADLINE_S = 3.0
FIRST_PROBE_BYTES = 64 * 1024
MAX_PROBE_BYTES = 4 * 2**20
LONG_ENOUGH_S = 0.2
"""A transfer of this length is long beside its delay and the noise of two schedulers."""

BULK_DEADLINE_S = 15.0
PARALLEL_PINGS = 4


class Rates(NamedTuple):
    """Bytes per second from here to the other node, and from there to here."""

    uplink_bytes_per_s: float
    downlink_bytes_per_s: float


async def serve_probes(fabric: Fabric, prefix: str, allow: Callable[[bytes], bool] | None = None) -> None:
    """Answer other nodes' probes until the fabric closes.

    Args:
        prefix: where the nodes of the run meet (`gossip.swarm_prefix`).
        allow: takes the public key of who asks.
    """
    node_id = fabric.identity.node_id
    noise = os.urandom(MAX_PROBE_BYTES)  # Noise, in case a link on the way compresses.

    async def echo(request: Request) -> bytes:
        return request.body

    async def take(request: Request) -> bytes:
        return len(request.body).to_bytes(8, "big")

    async def give(request: Request) -> bytes:
        size = int.from_bytes(request.body, "big")
        if size > MAX_PROBE_BYTES:
            raise RecordError(f"a probe asks for {size} bytes; at most {MAX_PROBE_BYTES} are sent.")
        return noise[:size]

    await fabric.serve(f"{prefix}/ping/{node_id}", echo, max_bytes=64, allow=allow)
    await fabric.serve(
        f"{prefix}/take/{node_id}", take, max_bytes=MAX_PROBE_BYTES, concurrency=2, backlog=2, allow=allow
    )
    await fabric.serve(f"{prefix}/give/{node_id}", give, max_bytes=8, concurrency=2, backlog=2, allow=allow)


async def measure_delay(fabric: Fabric, prefix: str, key: bytes, node_id: str) -> float:
    """Round-trip seconds to the node with this public key and id.

    Raises:
        NetworkError: it does not answer.
    """
    seconds = [
        await _timed(fabric, f"{prefix}/ping/{node_id}", key, b"ping", PING_DEADLINE_S) for _ in range(PINGS + 1)
    ]
    return statistics.median(seconds[1:])


async def measure_delays(fabric: Fabric, prefix: str, nodes: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """Round-trip seconds by node id, for a node's record; who does not answer is left out.

    Args:
        nodes: ids and public keys; the first `MAX_DELAYS` are measured.
    """
    slots = asyncio.Semaphore(PARALLEL_PINGS)
    found: dict[str, float] = {}

    async def one(node_id: str, key: bytes) -> None:
        try:
            async with slots:
                found[node_id] = min(MAX_DELAY_S, await measure_delay(fabric, prefix, key, node_id))
        except NetworkError:
            fabric.counters["probe_failed"] += 1

    await asyncio.gather(*(one(node_id, key) for node_id, key in list(nodes)[:MAX_DELAYS]))
    return dict(sorted(found.items()))


async def measure_rates(fabric: Fabric, prefix: str, key: bytes, node_id: str) -> Rates:
    """Bytes per second to and from the node with this public key and id.

    Raises:
        NetworkError: it does not answer, is busy with others' probes, or is too slow for the deadline.
    """
    delay_s = await measure_delay(fabric, prefix, key, node_id)
    noise = os.urandom(MAX_PROBE_BYTES)

    async def up(size: int) -> float:
        return await _timed(fabric, f"{prefix}/take/{node_id}", key, noise[:size], BULK_DEADLINE_S)

    async def down(size: int) -> float:
        return await _timed(fabric, f"{prefix}/give/{node_id}", key, size.to_bytes(8, "big"), BULK_DEADLINE_S)

    rates = []
    for transfer in (up, down):
        size = FIRST_PROBE_BYTES
        while (seconds := await transfer(size)) < LONG_ENOUGH_S + delay_s and size < MAX_PROBE_BYTES:
            size *= 2
        # A transfer cannot have taken no time at all; a tenth of what was measured is the least that is believed.
        rates.append(size / max(seconds - delay_s, seconds / 10))
    return Rates(*rates)


async def _timed(fabric: Fabric, path: str, key: bytes, body: bytes, deadline_s: float) -> float:
    started = time.perf_counter()
    await fabric.request(path, body, deadline_s, to=key)
    return time.perf_counter() - started
