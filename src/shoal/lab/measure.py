"""What a packet lab really does, beside what was asked of it: rate, delay and loss from one node to another.

Each pair is measured alone, by `probe` at both ends. What is asked of a pair is the slower of its two links, after
the loss between them, and its delay with the time that a small packet takes on both.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import msgspec

from shoal.errors import NetworkError
from shoal.lab.network import BYTES_PER_MEGABIT
from shoal.lab.packet import PacketLab, own_environment
from shoal.lab.probe import HEADERS_BYTES, SMALL_BYTES, Plan, Sight

PORT = 7717

MAX_FLOOD_MBPS = 150.0
"""The source is a small Python program: a faster path is not flooded, and its rate not measured."""

SPARE_S = 40.0
"""Start-up, hello and ends of the probes, on a busy machine."""


class Measurement(msgspec.Struct, frozen=True):
    """One direction between two nodes; a rate of `None` was not asked or is beyond the probe."""

    source: str
    target: str
    asked_mbps: float | None
    mbps: float | None
    asked_delay_ms: float
    delay_ms: float
    """Median over the packets that arrived."""
    asked_loss: float
    loss: float
    num_packets: int
    sight: Sight

    @property
    def rate_error(self) -> float:
        """Share by which the rate is off; 0 where there is none."""
        return 0.0 if self.asked_mbps is None or self.mbps is None else abs(self.mbps / self.asked_mbps - 1)

    @property
    def delay_error(self) -> float:
        """Share by which the delay is off; 0 where none was asked."""
        return abs(self.delay_ms / self.asked_delay_ms - 1) if self.asked_delay_ms else 0.0


async def measure(
    lab: PacketLab,
    source: str,
    target: str,
    *,
    num_packets: int = 300,
    gap_s: float = 0.004,
    flood_s: float = 2.0,
) -> Measurement:
    """Measure one direction; takes about num_packets x gap_s + flood_s + 2 seconds.

    Raises:
        NetworkError: the two do not reach each other.
    """
    network = lab.network
    up_mbps = network.nodes[network.index(source)].up_mbps
    down_mbps = network.nodes[network.index(target)].down_mbps
    met = network.impairment(source, target)
    arriving_mbps = None if up_mbps is None else up_mbps * (1 - met.loss) * (1 + met.duplicate)
    asked_mbps = min((rate for rate in (arriving_mbps, down_mbps) if rate is not None), default=None)
    flooded = asked_mbps is not None and (up_mbps or asked_mbps) <= MAX_FLOOD_MBPS
    plans = [
        Plan(
            role="source" if node == source else "sink",
            bind=lab.address(node),
            peer=lab.public_address(other),
            port=PORT,
            num_spaced=num_packets,
            gap_s=gap_s,
            flood_mbps=(up_mbps or down_mbps or 0.0) if flooded else 0.0,
            flood_s=flood_s,
            mtu=network.mtu,
        )
        for node, other in ((target, source), (source, target))
    ]
    ends = []
    for node, plan in zip((target, source), plans, strict=True):
        argv = [sys.executable, "-m", "shoal.lab.probe", msgspec.json.encode(plan).decode()]
        ends.append(await lab.run(node, argv, env=own_environment(), stdout=PIPE, stderr=PIPE))
    try:
        async with asyncio.timeout(num_packets * gap_s + flood_s + SPARE_S):
            (seen, _), (_, complaint) = await asyncio.gather(*(end.communicate() for end in ends))
    except TimeoutError:
        raise NetworkError(f"Measuring {source} to {target} did not end.", "Was the lab cut or stopped?") from None
    if any(end.returncode for end in ends):
        raise NetworkError(f"{source} does not reach {target}.", complaint.decode(errors="replace").strip()[-300:])
    sight = msgspec.json.decode(seen, type=Sight)
    bits = (SMALL_BYTES + HEADERS_BYTES) / BYTES_PER_MEGABIT
    on_links_s = sum(bits / rate for rate in (up_mbps, down_mbps) if rate is not None)
    return Measurement(
        source=source,
        target=target,
        asked_mbps=asked_mbps,
        mbps=sight.rate_mbps if flooded else None,
        asked_delay_ms=(met.delay_s + on_links_s) * 1e3,
        delay_ms=sight.delay_median_s * 1e3,
        asked_loss=met.loss,
        loss=1 - sight.num_spaced / num_packets,
        num_packets=num_packets,
        sight=sight,
    )
