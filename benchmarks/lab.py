"""What the packet lab carries on this machine, and how true its rates and delays are.

One TCP flow at a time through the switch: without limits, for its ceiling, and at rates that it is meant for. Beside
it the same flow over loopback, without a lab. Needs root and /dev/net/tun.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from asyncio.subprocess import PIPE
from typing import Any

from shoal.lab.measure import measure
from shoal.lab.network import Network, Node
from shoal.lab.packet import packet_lab
from shoal.lab.proxy import proxy_lab

from _common import benchmark, emit

FLOW_S = 4.0
WARM_UP_S = 1.0
"""Left out of the rate: TCP's slow start."""

PORT = 4200
CHUNK_BYTES = 2**18


def sink(address: str) -> None:
    """Print megabits a second of what came after the warm-up."""
    with socket.create_server((address, PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        buffer = bytearray(CHUNK_BYTES)
        num_bytes, start_s = 0, time.monotonic()
        counted_from_s = last_s = 0.0
        while count := connection.recv_into(buffer):
            last_s = time.monotonic()
            if counted_from_s:
                num_bytes += count
            elif last_s - start_s > WARM_UP_S:
                counted_from_s = last_s
        print(num_bytes * 8e-6 / (last_s - counted_from_s), flush=True)


def source(address: str) -> None:
    """Send for `FLOW_S`."""
    with contextlib.suppress(ConnectionError), socket.create_connection((address, PORT), 20) as connection:
        until_s = time.monotonic() + FLOW_S
        while time.monotonic() < until_s:
            connection.sendall(bytes(CHUNK_BYTES))


async def flow(mbps: float | None, delay_ms: float, mtu: int, tick_ms: float = 0.5) -> dict[str, Any]:
    """One TCP flow through the lab."""
    nodes = (Node(name="a", up_mbps=mbps, delay_ms=delay_ms), Node(name="b"))
    async with packet_lab(Network(nodes=nodes, mtu=mtu, tick_ms=tick_ms)) as lab:
        address = lab.address("b")
        receiver = await lab.run("b", [sys.executable, __file__, "sink", address], stdout=PIPE)
        assert receiver.stdout is not None
        await receiver.stdout.readline()
        before, begun_s = await lab.statistics(), time.monotonic()
        await lab.run("a", [sys.executable, __file__, "source", address])
        goodput_mbps = float(await asyncio.wait_for(receiver.stdout.readline(), 60))
        took_s = time.monotonic() - begun_s
        counted = await lab.statistics()
    num_packets = sum(node.up.packets for node in counted.nodes.values())
    return {
        "lab": "packet",
        "asked_mbps": mbps,
        "delay_ms": delay_ms,
        "mtu": mtu,
        "tick_ms": tick_ms,
        "goodput_mbps": goodput_mbps,
        "packets_per_s": num_packets / took_s,
        "switch_cpu_share": (counted.cpu_s - before.cpu_s) / took_s,
        "late_max_ms": counted.late_max_s * 1e3,
        "device_drops": counted.device_drops,
    }


async def plain(mbps: float | None, delay_ms: float, shaped: bool) -> dict[str, Any]:
    """The same flow over loopback, through the proxy lab's relay or through nothing."""
    nodes = (Node(name="a", up_mbps=mbps, delay_ms=delay_ms), Node(name="b"))
    async with proxy_lab(Network(nodes=nodes)) as lab:
        receiver = await lab.run("b", [sys.executable, __file__, "sink", "127.0.0.1"], stdout=PIPE)
        assert receiver.stdout is not None
        await receiver.stdout.readline()
        port = (await lab.relay("a", "b", PORT))[1] if shaped else PORT
        await lab.run("a", [sys.executable, __file__, "source", "127.0.0.1", str(port)])
        goodput_mbps = float(await asyncio.wait_for(receiver.stdout.readline(), 60))
    return {
        "lab": "proxy" if shaped else "none",
        "asked_mbps": mbps,
        "delay_ms": delay_ms if shaped else 0.0,
        "goodput_mbps": goodput_mbps,
    }


async def truth() -> list[dict[str, Any]]:
    """Rate and delay beside what was asked."""
    nodes = (
        Node(name="slow", up_mbps=5, down_mbps=100, delay_ms=40),
        Node(name="fast", up_mbps=100, down_mbps=100, delay_ms=10),
    )
    rows = []
    async with packet_lab(Network(nodes=nodes)) as lab:
        for ends in (("slow", "fast"), ("fast", "slow")):
            seen = await measure(lab, *ends)
            rows.append(
                {
                    "lab": "packet",
                    "asked_mbps": seen.asked_mbps,
                    "mbps": seen.mbps,
                    "asked_delay_ms": seen.asked_delay_ms,
                    "delay_median_ms": seen.delay_ms,
                    "rate_error": seen.rate_error,
                    "delay_error": seen.delay_error,
                }
            )
    return rows


async def rows() -> list[dict[str, Any]]:
    """Everything, one after the other."""
    flows = [
        await flow(None, 0, 1500),
        await flow(None, 0, 9000),
        await flow(200, 10, 1500),
        await flow(200, 50, 1500),
        await flow(20, 20, 1500),
        await flow(20, 20, 1500, tick_ms=2.0),
    ]
    return [*flows, await plain(200, 10, True), await plain(None, 0, False), *await truth()]


def main() -> None:
    """Run and tell."""
    result = asyncio.run(rows())
    ceiling = result[0]
    emit(
        result,
        {
            "ceiling_mbps": ceiling["goodput_mbps"],
            "ceiling_packets_per_s": ceiling["packets_per_s"],
            "goodput_at_200_mbps": result[2]["goodput_mbps"],
            "worst_rate_error": max(row["rate_error"] for row in result[-2:]),
            "worst_delay_error": max(row["delay_error"] for row in result[-2:]),
        },
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sink", address]:
            sink(address)
        case ["source", address, *port]:
            PORT = int(port[0]) if port else PORT
            source(address)
        case _:
            benchmark(main)
