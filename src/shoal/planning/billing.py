"""What a run has cost: each machine's dollars by its own tariff, and the budget that ends a run in order.

    per_use     price · seconds active                              billed by the second
    per_hour    price · ⌈hours from acquisition to release⌉          a begun hour is paid, active or parked
    egress      dollars a byte, sent to it

A machine billed by the hour that was lost, not given back, and is here again within the hour that it was paid for, goes
on in that hour: its connection was cut, or its process ended, and it was ours all the time.

Times are seconds on any one clock; a machine's times do not run backwards. Invariants: dollars never fall; what is
booked for a machine is exactly its tariff applied to its history, however often it was asked; idle and active dollars
add up to all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from shoal.planning.activation import Billing

HOUR_S = 3600.0


@dataclass
class Account:
    """One machine's history. `settled` is what can no longer change, at the prices of its time."""

    price_usd_per_hour: float
    billing: Billing = "per_use"
    usd_per_byte: float = 0.0
    acquired_at: float | None = None
    active_since: float | None = None
    settled_usd: float = 0.0
    settled_active_usd: float = 0.0
    left_hour: tuple[float, float, float] | None = None
    """Of a machine billed by the hour that was lost: when it was acquired, when its paid hour ends, what it cost."""
    egress_usd: float = 0.0

    def rental_usd(self, now: float) -> float:
        """Dollars for the machine itself until `now`."""
        if self.billing == "per_use":
            return self.settled_usd + self._working_usd(now)
        return self.settled_usd + self.price_usd_per_hour * self._hours_begun(now)

    def active_usd(self, now: float) -> float:
        """The part of it in which the machine was active."""
        return self.settled_active_usd + self._working_usd(now)

    def paid_hours_left(self, now: float) -> float:
        """What remains of the current paid hour."""
        if self.billing == "per_use" or self.acquired_at is None:
            return 0.0
        return self._hours_begun(now) - (now - self.acquired_at) / HOUR_S

    def acquire(self, now: float) -> None:
        """It is ours, from now or from when its paid hour began."""
        if self.acquired_at is not None:
            return
        self.acquired_at = now
        if self.left_hour is not None and now < self.left_hour[1]:
            self.acquired_at, _, paid_usd = self.left_hour
            self.settled_usd -= paid_usd
        self.left_hour = None

    def park(self, now: float) -> None:
        """It stops working."""
        self.settled_active_usd += self._working_usd(now)
        if self.billing == "per_use":
            self.settled_usd += self._working_usd(now)
        self.active_since = None

    def release(self, now: float, *, may_return: bool = False) -> None:
        """It is no longer ours; or it is not known whether it is."""
        self.park(now)
        if self.billing == "per_hour" and self.acquired_at is not None:
            hours = self._hours_begun(now)
            usd = self.price_usd_per_hour * hours
            self.settled_usd += usd
            if may_return:
                self.left_hour = (self.acquired_at, self.acquired_at + HOUR_S * hours, usd)
        self.acquired_at = None

    def _working_usd(self, now: float) -> float:
        """Dollars since it was last activated."""
        since = self.active_since
        return 0.0 if since is None else self.price_usd_per_hour * (now - since) / HOUR_S

    def _hours_begun(self, now: float) -> int:
        if self.acquired_at is None:
            return 0
        return max(1, math.ceil((now - self.acquired_at) / HOUR_S))


@dataclass
class Ledger:
    """All machines of a run: workers, and the learner's own."""

    accounts: dict[str, Account] = field(default_factory=dict)

    def add(self, machine: str, price_usd_per_hour: float, billing: Billing, usd_per_byte: float = 0.0) -> None:
        """A machine is known; nothing is paid for it yet. What it cost before stays booked at the price of then."""
        known = self.accounts.setdefault(machine, Account(price_usd_per_hour, billing, usd_per_byte))
        assert known.acquired_at is None, f"{machine} changes its tariff while in use"
        if (known.price_usd_per_hour, known.billing) != (price_usd_per_hour, billing):
            known.left_hour = None  # another tariff is another rental
        known.price_usd_per_hour, known.billing, known.usd_per_byte = price_usd_per_hour, billing, usd_per_byte

    def acquire(self, machine: str, now: float) -> None:
        """The machine is ours from now, parked."""
        self.accounts[machine].acquire(now)

    def activate(self, machine: str, now: float) -> None:
        """It works from now, acquired if it was not."""
        self.acquire(machine, now)
        account = self.accounts[machine]
        if account.active_since is None:
            account.active_since = now

    def park(self, machine: str, now: float) -> None:
        """It has no work from now, and stays ours."""
        self.accounts[machine].park(now)

    def release(self, machine: str, now: float) -> None:
        """It is given back, or was taken away."""
        self.accounts[machine].release(now)

    def lost(self, machine: str, now: float) -> None:
        """It is out of reach, and may be so for a moment or for good."""
        self.accounts[machine].release(now, may_return=True)

    def sent(self, machine: str, num_bytes: float) -> None:
        """Bytes that are charged as egress went to it."""
        account = self.accounts[machine]
        account.egress_usd += num_bytes * account.usd_per_byte

    def usd(self, now: float) -> float:
        """Everything spent until `now`."""
        return math.fsum(a.rental_usd(now) + a.egress_usd for a in self.accounts.values())

    def idle_usd(self, now: float) -> float:
        """What was paid for machines while they were parked or only held."""
        return math.fsum(a.rental_usd(now) - a.active_usd(now) for a in self.accounts.values())

    @property
    def egress_usd(self) -> float:
        """What was spent on sending."""
        return math.fsum(a.egress_usd for a in self.accounts.values())


Verdict = Literal["run", "drain"]


@dataclass(frozen=True)
class Budget:
    """`max_usd` for the whole run; `max_usd_per_hour` is a bound on plans (`activation.activate`)."""

    max_usd: float = math.inf
    max_usd_per_hour: float = math.inf

    def verdict(self, spent_usd: float, usd_per_hour: float, drain_s: float) -> Verdict:
        """`drain` as soon as finishing what runs and a checkpoint, `drain_s` at the present rate, would use up
        `max_usd`."""
        left = self.max_usd - spent_usd
        return "drain" if left <= usd_per_hour * drain_s / HOUR_S else "run"
