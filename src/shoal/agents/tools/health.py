"""How a tool has been doing: counts, latencies, and a circuit breaker. Pure: time is an argument.

The breaker is closed as long as things go well. `FAULTS_TO_OPEN` faults in a row open it (calls that were on their way
together and failed together, as when their server died, are one fault): for `cooldown_s` no call is
tried. Then one call may try (half-open): if it succeeds the breaker closes, if it fails the cool-down starts again,
twice as long each time up to `MAX_COOLDOWN_S`.

Invariant: while the breaker is open, at most one call is on its way.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from shoal.agents.tools.outcome import Failure, FailureKind, Outcome

FAULTS_TO_OPEN = 5
COOLDOWN_S = 5.0
MAX_COOLDOWN_S = 300.0
LATENCIES_KEPT = 512

FAULTS: frozenset[FailureKind] = frozenset({"timeout", "unavailable", "disconnected", "malformed"})
"""What speaks against the tool. An `error` may be the arguments' fault, so it doesn't."""


@dataclass
class Health:
    """One tool's record."""

    num_calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Failed calls by kind."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    faults_in_row: int = 0
    _last_fault_s: float = -math.inf
    _opened_s: float | None = None
    _cooldown_s: float = COOLDOWN_S
    _trying: bool = False

    def wait_s(self, now_s: float) -> float:
        """How long no call may be tried; 0 where one may."""
        if self._opened_s is None:
            return 0.0
        left = self._opened_s + self._cooldown_s - now_s
        return max(left, 0.0) if not self._trying else max(left, 0.1)

    def began(self) -> None:
        """A call is made, after `wait_s` gave 0."""
        self._trying = self._opened_s is not None

    def ended(self, outcome: Outcome, seconds: float, now_s: float) -> None:
        """A call has ended."""
        self.num_calls += 1
        tried, self._trying = self._trying, False
        if isinstance(outcome, Failure):
            self.failures[outcome.kind] += 1
        else:
            self.latencies_s.append(seconds)
        if isinstance(outcome, Failure) and outcome.kind in FAULTS:
            self.faults_in_row += now_s - seconds >= self._last_fault_s
            self._last_fault_s = now_s
            if tried:
                self._cooldown_s = min(2 * self._cooldown_s, MAX_COOLDOWN_S)
                self._opened_s = now_s
            elif self.faults_in_row >= FAULTS_TO_OPEN and self._opened_s is None:
                self._opened_s = now_s
        elif not (isinstance(outcome, Failure) and outcome.kind == "cancelled"):
            self.faults_in_row, self._opened_s, self._cooldown_s = 0, None, COOLDOWN_S

    def summary(self) -> dict[str, float | int | bool | dict[str, int]]:
        """For people and metrics."""
        ordered = sorted(self.latencies_s)
        return {
            "calls": self.num_calls,
            "failures": dict(self.failures),
            "p50_s": ordered[len(ordered) // 2] if ordered else 0.0,
            "p95_s": ordered[len(ordered) * 95 // 100] if ordered else 0.0,
            "open": self._opened_s is not None,
        }
