"""Token buckets by key: how much one sender may send.

Invariants: over any span of t seconds a key passes at most `burst + t × rate_per_s` times, unless it was forgotten in
between; at most `capacity` keys are remembered, and the one forgotten is the one unseen for longest. So limits by key
only hold against keys that cost something: those who share a limit (strangers) share one key.
"""

from __future__ import annotations

from collections import OrderedDict


class RateLimiter:
    """Buckets that fill at `rate_per_s` up to `burst`. Times are seconds on any one clock."""

    def __init__(self, rate_per_s: float, burst: float, capacity: int = 8192) -> None:
        assert rate_per_s > 0 and burst >= 1 and capacity >= 1
        self.rate_per_s = rate_per_s
        self.burst = burst
        self.capacity = capacity
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, key: bytes, now: float) -> bool:
        """Whether `key` may pass once more now; if so, it is counted."""
        tokens, since = self._buckets.pop(key, (self.burst, now))
        tokens = min(self.burst, tokens + max(0.0, now - since) * self.rate_per_s)
        passed = tokens >= 1.0
        # A clock set back must not stop the bucket from filling, so the newest time is always the one kept.
        self._buckets[key] = (tokens - passed, now)
        if len(self._buckets) > self.capacity:
            self._buckets.popitem(last=False)
        return passed

    def __len__(self) -> int:
        return len(self._buckets)
