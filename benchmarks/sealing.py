"""What sealing costs: one envelope written, checked and opened, plain and sealed; and requests through one router.

    shoal bench sealing --json

`cpu_us` is processor time of this one process, the best of several rounds, so that busy neighbours count little;
`wall_ms` is a request to another node through a router, all three in this process, over TLS on loopback: the median.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

from shoal.fabric.envelope import Envelope, Seal, check_envelope, open_body, write_envelope
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.router import Router
from shoal.fabric.sealing import SealingKey
from shoal.fabric.service import Request

from _common import benchmark, emit

SIZES = {64: 2000, 2**24: 4}
"""Bytes of a body -> envelopes a round."""

ROUNDS = 7
REQUESTS = {64: 200, 2**24: 8}


def best_us(what: Callable[[], object], times: int) -> float:
    """Processor time of one call in the best round."""
    rounds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(times):
            what()
        rounds.append((time.process_time() - started) / times)
    return min(rounds) * 1e6


def envelope_row(size: int, seal: Seal | None, reader: SealingKey) -> dict[str, object]:
    sender, body = Identity.generate(), bytes(size)

    def write() -> Envelope:
        return write_envelope(sender, "request", "run/batch", body, now=0.0, to=bytes(32), seal=seal)

    made = write()

    def check() -> None:
        check_envelope(made.header, made.attachment, made.body, kinds=("request",), key="run/batch")

    return {
        "what": "envelope",
        "bytes": size,
        "sealed": seal is not None,
        "write_cpu_us": best_us(write, SIZES[size]),
        "check_cpu_us": best_us(check, SIZES[size]),
        "open_cpu_us": best_us(lambda: open_body(made.header, made.attachment, made.body, reader), SIZES[size]),
    }


async def request_rows() -> list[dict[str, object]]:
    """Plain and sealed requests take turns, so that both meet the same neighbours."""

    async def echo(request: Request) -> bytes:
        return request.body

    rows: list[dict[str, object]] = []
    async with (
        await Router.open(Identity.generate(), "127.0.0.1", 0) as router,
        await Fabric.listen(Identity.generate(), routers=[router.address]) as coordinator,
    ):
        await coordinator.unconnected(10.0)
        await coordinator.serve("echo", echo)
        ticket = coordinator.ticket("a run", bytes(16)).elsewhere()
        async with await Fabric.connect(Identity.generate(), ticket) as node:
            for size, times in REQUESTS.items():
                took: dict[bytes, list[float]] = {b"": [], coordinator.identity.public_key: []}
                for to in [*took] * times:
                    started = time.perf_counter()
                    await node.request("echo", bytes(size), 60.0, to=to, absent_grace_s=30.0)
                    took[to].append(time.perf_counter() - started)
                for to, seconds in took.items():
                    wall_ms = statistics.median(seconds) * 1e3
                    rows.append({"what": "request", "bytes": size, "sealed": bool(to), "wall_ms": wall_ms})
    return rows


def main() -> None:
    own, reader = SealingKey.generate(), SealingKey.generate()
    seal = Seal(own, reader.public_key)
    rows = [envelope_row(size, choice, reader) for size in SIZES for choice in (None, seal)]
    rows += asyncio.run(request_rows())
    cost = {size: difference(rows, size) for size in SIZES}
    emit(rows, {"small_cpu_us": cost[64], "chunk_16mib_cpu_ms": cost[2**24] / 1e3})


def difference(rows: list[dict[str, object]], size: int) -> float:
    """What sealing adds on both sides of one message, microseconds of processor time."""
    total = {False: 0.0, True: 0.0}
    for row in rows:
        if row["what"] == "envelope" and row["bytes"] == size:
            parts = [row[f"{part}_cpu_us"] for part in ("write", "check", "open")]
            total[bool(row["sealed"])] = sum(part for part in parts if isinstance(part, float))
    return total[True] - total[False]


if __name__ == "__main__":
    benchmark(main)
