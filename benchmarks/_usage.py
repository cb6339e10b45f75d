"""What a measurement cost the machine and the network: idle processors, retransmitted packets, full queues.

A time is the protocol's only where the processors had time to spare and the lab's switch kept its pace: rows carry
these beside their seconds, so that whoever reads them can tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shoal.lab.packet import PacketLab


class Processors:
    """How idle the machine has been since this was made."""

    def __init__(self) -> None:
        self._idle, self._total = _jiffies()

    @property
    def idle(self) -> float:
        """Share of all processors' time that nobody used."""
        idle, total = _jiffies()
        return (idle - self._idle) / max(1, total - self._total)


def _jiffies() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def segments(pids: Iterable[int]) -> tuple[int, int]:
    """TCP segments sent, and sent again, in the namespaces of these processes; one process a namespace."""
    sent = again = 0
    for pid in pids:
        lines = [line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()]
        names, values = [line[1:] for line in lines if line[0] == "Tcp:"]
        counts = dict(zip(names, map(int, values), strict=True))
        sent, again = sent + counts["OutSegs"], again + counts["RetransSegs"]
    return sent, again


async def network_cost(lab: PacketLab, source: str, num_bytes: int) -> dict[str, Any]:
    """What crossed the lab, as seen by its switch."""
    counted = await lab.statistics()
    links = [link for node in counted.nodes.values() for link in (node.up, node.down)]
    return {
        "source_uplink_files": counted.nodes[source].up.bytes / num_bytes,
        "dropped_share": sum(link.dropped_packets for link in links) / max(1, sum(link.packets for link in links)),
        "lab_late_ms": 1e3 * counted.late_max_s,
        "lab_cpu_s": counted.cpu_s,
        "lab_lost": counted.device_drops,
    }
