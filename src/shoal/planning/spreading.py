"""How long a snapshot takes to reach workers: bounds and models, for planning before anything was measured.

M bytes, N workers with uplinks u_i and downlinks d_i, a source with uplink u_s; n chunks, fan-out d, depth D, hop
delay a.

    fluid optimum    T* = max( M/u_s,  M/min d_i,  N·M/(u_s + Σu_i) )              Kumar and Ross, 2006
    star             T  = N·M/u_s, and no worker sooner than its own downlink allows
    pipelined tree   T  ≈ (n + D − 1)·d·(M/n)/u + D·a                                a chain is d = 1, D = N

A running coordinator uses what it measures. Invariant: no strategy is faster than the fluid optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def common_s(num_bytes: float, source_bytes_per_s: float, uplinks: Sequence[float]) -> float:
    """The fluid optimum but for the workers' downlinks: what everybody together can pass on."""
    if not uplinks:
        return 0.0
    pooled = len(uplinks) * num_bytes / (source_bytes_per_s + math.fsum(uplinks))
    return max(num_bytes / source_bytes_per_s, pooled)


def fluid_s(num_bytes: float, source_bytes_per_s: float, uplinks: Sequence[float], downlinks: Sequence[float]) -> float:
    """T*, in seconds; no workers take no time."""
    if not uplinks:
        return 0.0
    return max(common_s(num_bytes, source_bytes_per_s, uplinks), num_bytes / min(downlinks))


def star_s(num_bytes: float, source_bytes_per_s: float, downlinks: Sequence[float]) -> float:
    """The source sends to each worker itself, to all at once."""
    if not downlinks:
        return 0.0
    return max(len(downlinks) * num_bytes / source_bytes_per_s, num_bytes / min(downlinks))


def tree_s(
    num_bytes: float, uplink_bytes_per_s: float, *, num_chunks: int, fan_out: int, depth: int, hop_s: float
) -> float:
    """A tree of equal uplinks in which a chunk is passed on as soon as it is there."""
    chunk_s = num_bytes / num_chunks / uplink_bytes_per_s
    return (num_chunks + depth - 1) * fan_out * chunk_s + depth * hop_s
