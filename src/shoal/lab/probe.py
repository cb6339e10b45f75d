"""The yardstick's two ends: small UDP programs that a lab runs at two nodes, to see what a path really does.

The two say hello until they hear each other, which also opens the NATs before both. Then the source sends evenly
spaced small packets with the time in them (all nodes of a lab share one clock, so one-way delays can be read), then
for a while more than the path can carry. The sink takes the kernel's time of arrival, so that a busy machine, which
lets the sink wait for a processor, does not show as delay. It prints what it saw as one JSON line. Started as
`python -m shoal.lab.probe PLAN`, the plan as JSON.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import sys
import time
from typing import Literal

import msgspec

from shoal.errors import NetworkError

HEADERS_BYTES = 28
"""IPv4 and UDP."""

LAYOUT = struct.Struct("!cIQ")
"""Kind, serial number, `time.time_ns` at the source."""

SO_TIMESTAMPNS = 35
"""Linux: each datagram brings the real-time clock's reading at its arrival, as two 64-bit numbers."""

TIMESPEC = struct.Struct("@qq")

HELLO, HEARD, SPACED, FLOOD, END = b"h", b"H", b"s", b"f", b"e"

SMALL_BYTES = 64
HELLO_GAP_S = 0.05
HELLO_WAIT_S = 15.0
SILENCE_S = 5.0
"""The sink gives up after this long without a packet."""

OVERLOAD = 1.15
"""The flood is this much above the rate that is to be found."""

FLOOD_GAP_S = 0.002
SETTLE_S = 0.3
"""Pause after each phase, for queues to empty."""

NUM_ENDS = 40
"""The source says so often that it is done, unless the sink confirms it..."""

NUM_ANSWERS = 5
"""...which it does so often at once."""

BUFFER_BYTES = 4 * 2**20


class Plan(msgspec.Struct, frozen=True):
    """What one end has to do; both get the same but for `role`, `bind` and `peer`."""

    role: Literal["source", "sink"]
    bind: str
    peer: str
    port: int
    num_spaced: int
    gap_s: float
    flood_mbps: float
    flood_s: float
    mtu: int


class Sight(msgspec.Struct, frozen=True):
    """What the sink saw. A share or rate is 0 where nothing came."""

    num_spaced: int
    """Different spaced packets that arrived."""
    num_duplicates: int
    num_overtaken: int
    """Spaced packets that arrived after a later one."""
    delay_median_s: float
    delay_min_s: float
    delay_max_s: float
    rate_mbps: float
    """Of IP packets, headers included, while flooded."""


def main() -> int:
    """Entry point."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        end.bind((plan.bind, plan.port))
        peer = (plan.peer, plan.port)
        try:
            if plan.role == "source":
                _send(end, _greet(end, peer), plan)
            else:
                print(msgspec.json.encode(_watch(end, peer)).decode(), flush=True)
        except NetworkError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


def _greet(end: socket.socket, peer: tuple[str, int]) -> tuple[str, int]:
    """Say hello until the peer has heard it; returns where it answered from, which its NAT may have chosen."""
    deadline = time.monotonic() + HELLO_WAIT_S
    end.settimeout(HELLO_GAP_S)
    kind = HELLO
    while time.monotonic() < deadline:
        _tell(end, peer, kind)
        with contextlib.suppress(TimeoutError, ConnectionError):
            answer, peer = end.recvfrom(2048)
            kind = HEARD
            if answer[:1] == HEARD:
                return peer
    raise NetworkError(f"No answer from {peer[0]} in {HELLO_WAIT_S:g} s.", "Is there a path, and do the NATs allow it?")


def _send(end: socket.socket, peer: tuple[str, int], plan: Plan) -> None:
    end.settimeout(None)
    start_s = time.monotonic()
    for serial in range(plan.num_spaced):
        _sleep_until(start_s + serial * plan.gap_s)
        _tell(end, peer, SPACED, serial)
    time.sleep(SETTLE_S)
    payload_bytes = plan.mtu - HEADERS_BYTES
    per_s = plan.flood_mbps * OVERLOAD * 125_000 / plan.mtu
    start_s = time.monotonic()
    sent = 0
    while (passed_s := time.monotonic() - start_s) < plan.flood_s and plan.flood_mbps:
        while sent < passed_s * per_s:
            _tell(end, peer, FLOOD, sent, payload_bytes)
            sent += 1
        time.sleep(FLOOD_GAP_S)
    time.sleep(SETTLE_S)
    end.settimeout(HELLO_GAP_S)
    for _ in range(NUM_ENDS):
        _tell(end, peer, END)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while end.recv(2048)[:1] != END:
                continue
            return


def _watch(end: socket.socket, peer: tuple[str, int]) -> Sight:
    delays: dict[int, float] = {}
    num_duplicates = num_overtaken = latest = num_bytes = 0
    first_s = last_s = 0.0
    end.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    end.settimeout(HELLO_GAP_S)
    quiet_since_s = time.monotonic() + HELLO_WAIT_S - SILENCE_S
    kind = b""
    while kind != END:
        try:
            packet, extras, _, peer = end.recvmsg(65536, 256)
        except (TimeoutError, ConnectionError):
            if time.monotonic() - quiet_since_s > SILENCE_S:
                break
            if kind in (b"", HELLO, HEARD):
                _tell(end, peer, HEARD if kind else HELLO)
            continue
        quiet_since_s = time.monotonic()
        now_ns = _arrived_ns(extras)
        kind, serial, sent_ns = LAYOUT.unpack_from(packet)
        if kind in (HELLO, HEARD):
            _tell(end, peer, HEARD)
        elif kind == SPACED:
            if serial in delays:
                num_duplicates += 1
                continue
            num_overtaken += serial < latest
            latest = max(latest, serial)
            delays[serial] = (now_ns - sent_ns) / 1e9
        elif kind == FLOOD:
            last_s = now_ns / 1e9
            if not first_s:  # the interval begins after the first packet, whose bytes therefore do not count
                first_s = last_s
                continue
            num_bytes += len(packet) + HEADERS_BYTES
    for _ in range(NUM_ANSWERS):
        _tell(end, peer, END)
    seen = list(delays.values()) or [0.0]
    rate_mbps = num_bytes / (last_s - first_s) / 125_000 if last_s > first_s else 0.0
    return Sight(len(delays), num_duplicates, num_overtaken, statistics.median(seen), min(seen), max(seen), rate_mbps)


def _arrived_ns(extras: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in extras:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = TIMESPEC.unpack(data[: TIMESPEC.size])
            return int(seconds) * 10**9 + int(nanoseconds)
    return time.time_ns()


def _tell(end: socket.socket, peer: tuple[str, int], kind: bytes, serial: int = 0, size: int = SMALL_BYTES) -> None:
    packet = LAYOUT.pack(kind, serial, time.time_ns()).ljust(size, b"\0")
    with contextlib.suppress(ConnectionError, BlockingIOError):  # a port not yet bound over there
        end.sendto(packet, peer)


def _sleep_until(time_s: float) -> None:
    wait_s = time_s - time.monotonic()
    if wait_s > 0:
        time.sleep(wait_s)


if __name__ == "__main__":
    raise SystemExit(main())
