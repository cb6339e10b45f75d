"""What `shoal doctor TICKET` looks at between this machine and a run: each address, then the run itself.

    resolve ──▶ TCP, TLS, pin ──▶ admission ──▶ round trip ──▶ clock ──▶ versions ──▶ rate

Each step needs the one before it; the first that fails says what is wrong, and the rest is left out.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator

import shoal
from shoal.cli.checks_machine import Check, State
from shoal.cli.reach import Reached, Target, reaching, ticket_of
from shoal.errors import NetworkError, RecordError, ShoalError
from shoal.fabric.endpoint import Endpoint
from shoal.fabric.identity import node_id_of
from shoal.fabric.join import JOIN_WINDOW_S
from shoal.fabric.session import find_reachable
from shoal.protocol.status import RunStatus
from shoal.swarm.gossip import swarm_prefix
from shoal.swarm.measure import measure_delay, measure_rates

PROBE_S = 4.0
CONNECT_S = 15.0
"""Whoever asks for a diagnosis has more patience than whoever wants a glance."""

CLOCK_WARNING_S = 2.0
"""Clocks that NTP keeps are within this; leases and grants bear more."""

SLOW_BYTES_PER_S = 1e6
"""The embedded model takes more than four minutes below this."""


async def network_checks(target: Target) -> AsyncIterator[Check]:
    """All of them, each as soon as it is known."""
    ticket = ticket_of(target)
    addresses = [("coordinator", Endpoint.parse(text), ticket.coordinator_key) for text in ticket.endpoints]
    for number, router in enumerate(ticket.routers):
        addresses += [(f"router {number}", endpoint, router.key) for endpoint in router.endpoints]
    for role, endpoint, key in addresses:
        yield await _address(role, endpoint, key, alone=len(addresses) == 1)
    try:
        async with reaching(target, CONNECT_S) as reached:
            yield Check("admission", "ok", f"run '{ticket.run}' lets this machine look")
            async for check in _run_checks(reached, ticket.run):
                yield check
    except ShoalError as error:
        yield Check("run", "failed", error.problem, error.remedy)


async def _address(role: str, endpoint: Endpoint, key: bytes, *, alone: bool) -> Check:
    """One address; several of a ticket may well not be reachable from here, one must be."""
    name = f"{role} {endpoint}"
    state: State = "failed" if alone else "warning"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(PROBE_S):
            found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError) as error:
        return Check(name, state, f"{endpoint.host} has no address here: {error}", "Check the name and this DNS.")
    started = time.monotonic()
    try:
        await find_reachable([endpoint], key, PROBE_S)
    except NetworkError as error:
        return Check(name, state, error.problem, error.remedy)
    how = "TLS with the ticket's key" if endpoint.scheme == "tls" else "plain TCP on this machine"
    return Check(name, "ok", f"{found[0][4][0]}, {how}, in {(time.monotonic() - started) * 1000:.0f} ms")


async def _run_checks(reached: Reached, run: str) -> AsyncIterator[Check]:
    await reached.status()  # The first request learns keys; the second shows what one takes.
    started, sent_at = time.monotonic(), time.time()
    status = await reached.status()
    took_s = time.monotonic() - started
    yield Check("answer", "ok", f"{len(status.nodes)} nodes told of in {took_s * 1000:.0f} ms")
    yield _clock(status.coordinator.now - (sent_at + took_s / 2), took_s / 2)
    yield _versions(status)
    key, prefix = reached.coordinator_key, swarm_prefix(run)
    try:
        delay_s = await measure_delay(reached.fabric, prefix, key, node_id_of(key))
        yield Check("round trip", "ok", f"{delay_s * 1000:.1f} ms to the coordinator")
        rates = await measure_rates(reached.fabric, prefix, key, node_id_of(key))
    except (NetworkError, RecordError) as error:
        yield Check("rate", "warning", error.problem, "Ask again while nothing else is transferred.")
        return
    up, down = rates.uplink_bytes_per_s, rates.downlink_bytes_per_s
    slow = min(up, down) < SLOW_BYTES_PER_S
    remedy = "Snapshots will take minutes here; publish less often (learner.publish_every)." if slow else ""
    yield Check("rate", "warning" if slow else "ok", f"{up / 1e6:.1f} MB/s up, {down / 1e6:.1f} MB/s down", remedy)


def _clock(offset_s: float, uncertainty_s: float) -> Check:
    """Against the coordinator's, which its signed answer tells."""
    detail = f"{abs(offset_s):.2f} s {'behind' if offset_s > 0 else 'ahead of'} the coordinator's, ±{uncertainty_s:.2f}"
    remedy = "Set the clocks of both machines, for example by `timedatectl set-ntp true`."
    if abs(offset_s) - uncertainty_s > JOIN_WINDOW_S:
        return Check("clock", "failed", detail, remedy)
    if abs(offset_s) - uncertainty_s > CLOCK_WARNING_S:
        return Check("clock", "warning", detail, remedy)
    return Check("clock", "ok", detail)


def _versions(status: RunStatus) -> Check:
    """Of Shoal, on every node that answers."""
    told = [status.coordinator, *(node.status for node in status.nodes if node.status is not None)]
    counts = Counter(f"{node.software} (protocol {node.protocol_version})" for node in told)
    own = f"{shoal.__version__} (protocol {shoal.PROTOCOL_VERSION})"
    detail = ", ".join(f"{count} nodes run {version}" for version, count in counts.most_common())
    if any(node.protocol_version != shoal.PROTOCOL_VERSION for node in told):
        return Check("versions", "failed", f"{detail}; this machine {own}", "Install the same version everywhere.")
    if set(counts) != {own}:
        return Check("versions", "warning", f"{detail}; this machine {own}", "Install the same version everywhere.")
    return Check("versions", "ok", detail)
