"""How fast a node's own uplink is, told by what it sends anyway: no probes, and nobody else is asked.

    rate of an interval = bytes that others acknowledged in it, over all links / its length

An interval counts only if bytes waited to be sent at both its ends; otherwise it was work that lacked, not uplink.
Receivers and the machine's other traffic make an interval slower and nothing makes it faster, so the estimate is a
high quantile of the newest ones.

Pure: counts and times are arguments (`link.Link.counts` reads them from the kernel). Invariant: the estimate is 0,
for unknown, until `MIN_INTERVALS` counted, and never above the fastest of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

INTERVAL_S = 0.5
"""Between two samples: some round trips of any link."""

KEPT_INTERVALS = 120
MIN_INTERVALS = 3
QUANTILE = 0.75


class SendCounts(NamedTuple):
    """One connection at one moment."""

    acknowledged: int
    """Bytes since it was opened."""
    waiting: int
    """Bytes not sent yet."""


class UplinkMeter:
    """One node's."""

    def __init__(self) -> None:
        self._before: dict[int, SendCounts] = {}
        self._sampled_at = 0.0
        self._rates: deque[float] = deque(maxlen=KEPT_INTERVALS)

    def sample(self, counts: Mapping[int, SendCounts], now: float) -> None:
        """Take in how all connections stand, by numbers that are never used again."""
        both = counts.keys() & self._before.keys()
        was_busy = any(one.waiting for one in self._before.values())
        if was_busy and any(one.waiting for one in counts.values()) and now > self._sampled_at:
            num_bytes = sum(counts[key].acknowledged - self._before[key].acknowledged for key in both)
            num_bytes += sum(counts[key].acknowledged for key in counts.keys() - both)
            self._rates.append(num_bytes / (now - self._sampled_at))
        self._before, self._sampled_at = dict(counts), now

    @property
    def bytes_per_s(self) -> float:
        """What the uplink carries; 0 while unknown."""
        if len(self._rates) < MIN_INTERVALS:
            return 0.0
        return sorted(self._rates)[int(QUANTILE * (len(self._rates) - 1))]
