"""Who works, when, and what it costs: the capacity planner, fed by what a run measures of itself.

    leases, submissions ──▶ RateMeter (μ_i), Pacer (D) ─┐
    batches asked and served ──▶ Pacer (T_train) ───────┼──▶ Load ──▶ target rate ──▶ replan ──▶ who is parked
    publications, versions held ──▶ Arrivals ───────────┘        └──▶ κ, predicted utilisation
    who is here, at what price ──▶ Ledger ──▶ dollars ──▶ Budget ──▶ drain

What decides is in `planning`, and the simulator plays the very same; here is only how a run feeds it. The unit is a
group of rollouts throughout; what people see is in rollouts. Time is an argument.

Invariants: nobody is parked before T_train and at least one worker were measured, nor anybody who costs nothing;
a parked worker finishes what it holds; what was spent is on disk before the step after it, and a run that is resumed
goes on from there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from shoal.config import AsyncLearner, Config
from shoal.coordinator.rundir import RunDir
from shoal.errors import StorageError
from shoal.planning.activation import Offer, Plan, replan
from shoal.planning.arrivals import Arrivals
from shoal.planning.billing import Budget, Ledger
from shoal.planning.capacity import Load, freshest_interval, publish_interval, target_rate, utilisation
from shoal.planning.pacing import Pacer
from shoal.planning.queue import GroupQueue
from shoal.planning.rates import RateMeter
from shoal.planning.staleness import may_start

FILE = "costs.json"

LEARNER = "learner"
"""The ledger's name for the machine that the run was started on."""

HOURS_OF_GRACE = 0.05
"""A parked machine is given back when less than this is left of its paid hour."""

SHORT_STEPS = 3
"""A learner that waits while priced workers are parked has the plan made anew after this many steps."""

SHORT_SHARE = 0.1
"""It waits if it does so for more than this share of a step."""

GIGABYTE = 1e9


class Provisioning:
    """One run's planner."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self.config = config
        self._run = run
        rollout, learner, budget = config.rollout, config.learner, config.budget
        self.pacer = Pacer(rollout.groups_per_step, learner.max_staleness)
        self.meter = RateMeter()
        self.arrivals = Arrivals()
        self.ledger = Ledger()
        self.budget = Budget(
            max_usd=math.inf if budget.max_usd is None else budget.max_usd,
            max_usd_per_hour=math.inf if budget.max_usd_per_hour is None else budget.max_usd_per_hour,
        )
        self.plan: Plan | None = None
        self.parked: frozenset[str] = frozenset()
        self.interval = learner.publish_every
        """κ."""
        self._here: dict[str, Offer] = {}
        self._granted_at: dict[str, tuple[str, float]] = {}
        """Running training leases: whose, and since when."""
        self._step = 0
        self._planned_step = 0
        self._asked_at = 0.0
        self._asked_step = self._served_step = -1
        self._waited_s = 0.0
        self._spent_before = self._read()
        if budget.learner_usd_per_hour:
            self.ledger.add(LEARNER, budget.learner_usd_per_hour, "per_use")

    # What happens

    def admits(self, queue: GroupQueue, now: float) -> bool:
        """Whether the next group may start now."""
        return not self.config.capacity.pace or self.pacer.admits(queue, now)

    def opens_in(self, queue: GroupQueue, now: float) -> float:
        """Seconds until pacing lets the next group start."""
        return self.pacer.opens_at(queue.ahead) - now if self.config.capacity.pace else 0.0

    def start(self, queue: GroupQueue, node_id: str, published: int) -> tuple[int, int] | None:
        """The number of the group that a worker starts now, and under which version; None where none may start.

        It is the newest version, which the worker then waits for if it is on its way. Where workers can hardly keep up,
        that time is worth more than freshness: they go on with what they hold, if that is fresh enough.
        """
        steps, held = self.config.run.steps, self.arrivals.held_by(node_id)
        may_be_older = isinstance(self.config.learner, AsyncLearner) and self.pacer.is_short and not queue.pending
        versions = (held, published) if may_be_older and 0 <= held < published else (published,)
        for version in versions:
            number = queue.start(version, steps)
            if number is not None:
                return number, version
        return None

    def go_on(self, queue: GroupQueue, node_id: str, newest: int) -> tuple[int, int] | None:
        """As `start`, while nobody gives out versions: the worker goes on under the one it holds, up to `newest`.

        Lost groups, too, start only where admission opens under that version: it may be older than the one for which
        they were admitted. A worker that holds nothing yet says 0.
        """
        held = self.arrivals.held_by(node_id)
        is_fresh = may_start(queue.ahead, held, queue.max_staleness, queue.groups_per_step)
        number = queue.start(held, self.config.run.steps) if 0 < held <= newest and is_fresh else None
        return None if number is None else (number, held)

    def started(self, lease_id: str, node_id: str, now: float) -> None:
        """A group was leased."""
        self._granted_at[lease_id] = (node_id, now)
        self.meter.started(node_id, now)
        self.arrivals.started(node_id, now)

    def ended(self, lease_id: str, now: float, *, accepted: bool) -> None:
        """A group's lease ended; one that is not known is none of these."""
        node_id, granted_at = self._granted_at.pop(lease_id, ("", 0.0))
        if not node_id:
            return
        self.meter.ended(node_id, int(accepted), now)
        self.arrivals.ended(node_id, float(accepted), now)
        if accepted:
            self.pacer.finished(now - granted_at, now)
        self._update_rate()

    def left(self, node_id: str) -> None:
        """A worker is gone, and what it held is lost."""
        self._granted_at = {i: held for i, held in self._granted_at.items() if held[0] != node_id}
        self.meter.left(node_id)
        self.arrivals.left(node_id)
        self._update_rate()

    def _update_rate(self) -> None:
        """Λ is what those make together who are given work."""
        self.pacer.rate = self.meter.total - math.fsum(self.meter.rate(node_id) or 0.0 for node_id in self.parked)

    def asked(self, step: int, now: float) -> None:
        """The learner asks for the batch of `step`."""
        self.pacer.asked(step, now)
        if step != self._asked_step:
            self._step = self._asked_step = step
            self._asked_at = now

    def served(self, step: int, buffered: int, now: float) -> None:
        """The learner got the batch; `buffered` groups are left."""
        self.pacer.served(step, buffered + self.config.rollout.groups_per_step, now)
        if step != self._served_step:
            self._served_step = step
            self._waited_s += now - self._asked_at

    def holds(self, node_id: str, version: int, now: float) -> None:
        """A worker says which version it has."""
        self.arrivals.holds(node_id, version, now)

    def published(self, version: int, num_bytes: float, now: float) -> None:
        """A version is out, and `num_bytes` go to each worker elsewhere."""
        self.arrivals.published(version, self.active, now)
        for offer in self._here.values():
            # A worker on the run's own machine has no link to measure, and takes the bytes from its disk.
            if math.isfinite(offer.downlink_bytes_per_s):
                self.ledger.sent(offer.id, num_bytes)
        self._write(now)

    def see(self, workers: Sequence[Offer], now: float) -> bool:
        """Take in who is here, at what price, and plan anew where something changed or the time has come.

        Args:
            workers: rates are not read: they are measured.

        Returns:
            Whether others are parked now than before.
        """
        here = {offer.id: offer for offer in workers}
        changed = here != self._here
        for node_id in self._here.keys() - here.keys():
            self.ledger.lost(node_id, now)
        for offer in workers:
            self._book(offer, now)
        self._here = here
        if LEARNER in self.ledger.accounts:
            self.ledger.activate(LEARNER, now)
        if not (changed or self._is_due()):
            return False
        before = self.parked
        self._replan(now)
        self._write(now)
        return before != self.parked

    def _book(self, offer: Offer, now: float) -> None:
        """Machines billed by the hour keep the tariff under which they came."""
        account = self.ledger.accounts.get(offer.id)
        held = account is not None and account.acquired_at is not None
        if account is not None and held:
            if account.billing == "per_hour" or account.price_usd_per_hour == offer.price_usd_per_hour:
                return
            self.ledger.release(offer.id, now)
        self.ledger.add(
            offer.id,
            offer.price_usd_per_hour,
            offer.billing,
            self.config.budget.egress_usd_per_gb / GIGABYTE,
        )
        (self.ledger.acquire if offer.id in self.parked else self.ledger.activate)(offer.id, now)

    # The plan

    @property
    def active(self) -> list[str]:
        """Workers that are here and not parked."""
        return [node_id for node_id in self._here if node_id not in self.parked]

    def _is_due(self) -> bool:
        if self.pacer.train_s is None or self._step == self._planned_step:
            return False
        steps = self._step - self._planned_step
        waits = self._waited_s > SHORT_SHARE * steps * self.pacer.train_s
        short = bool(self.parked) and waits and steps >= SHORT_STEPS
        return short or self.plan is None or steps >= self.config.capacity.replan_steps

    def load(self) -> Load | None:
        """What the run asks of its workers, in groups; None before a step was measured."""
        if self.pacer.train_s is None or self.pacer.train_s <= 0:
            return None
        return Load(
            rollouts_per_step=self.config.rollout.groups_per_step,
            train_s=self.pacer.train_s,
            bcast_s=self.arrivals.bcast_s or 0.0,
            max_staleness=self.config.learner.max_staleness,
            stall=self.arrivals.stall,
            rollout_s=self.pacer.lead_s,
        )

    def _replan(self, now: float) -> None:
        load = self.load()
        measured = [rate for node_id in self._here if (rate := self.meter.rate(node_id)) is not None]
        if load is None or not measured:
            self.plan = None
            self._set_parked(frozenset(), now)
            return
        self._planned_step, self._waited_s = self._step, 0.0
        typical = statistics.median(measured)
        offers = [
            replace(
                offer,
                rate=self.meter.expected(offer.id, typical),
                paid_hours=self.ledger.accounts[offer.id].paid_hours_left(now),
            )
            for offer in self._here.values()
        ]
        needed = target_rate(load)
        capacity = self.config.capacity
        self.plan = replan(
            frozenset(self.active),
            offers,
            lambda _: needed,
            headroom=capacity.headroom,
            max_usd_per_hour=self.budget.max_usd_per_hour,
        )
        costly = {offer.id for offer in offers if offer.price_usd_per_hour > 0}
        within_budget = math.isinf(self.budget.max_usd_per_hour)
        parks = capacity.park or not within_budget
        self._set_parked(frozenset(costly - self.plan.active) if parks else frozenset(), now)
        rate = math.fsum(offer.rate for offer in offers if offer.id not in self.parked)
        if capacity.adapt_interval and isinstance(self.config.learner, AsyncLearner):
            self.interval = freshest_interval(load, rate) if load.stall < 0.5 else publish_interval(load)

    def _set_parked(self, parked: frozenset[str], now: float) -> None:
        for node_id in parked - self.parked:
            self.ledger.park(node_id, now)
        for node_id in self.parked - parked:
            if node_id in self._here:
                self.ledger.activate(node_id, now)
        self.parked = parked
        self._update_rate()

    @property
    def missing_rate(self) -> float:
        """Rollouts a second that the plan lacks; 0 where it covers."""
        if self.plan is None or self.plan.limited_by_budget or not math.isfinite(self.plan.shortfall):
            return 0.0
        return self.plan.shortfall * self.config.rollout.group_size

    def to_release(self, now: float) -> list[str]:
        """Parked machines billed by the hour whose paid hour is nearly over."""
        return [
            node_id
            for node_id in sorted(self.parked & self._here.keys())
            if (account := self.ledger.accounts[node_id]).billing == "per_hour"
            and account.paid_hours_left(now) < HOURS_OF_GRACE
        ]

    # What it costs

    def usd(self, now: float) -> float:
        """Everything spent on the run until now, in earlier lives of this process as well."""
        return self._spent_before + self.ledger.usd(now)

    def working_usd(self, now: float) -> float:
        """What workers cost while they worked, in this life of the process."""
        accounts = self.ledger.accounts.items()
        return math.fsum(account.active_usd(now) for name, account in accounts if name != LEARNER)

    @property
    def usd_per_hour(self) -> float:
        """What the run costs an hour as it stands: who works, who is paid by the hour, and this machine."""
        prices = (
            offer.price_usd_per_hour
            for offer in self._here.values()
            if offer.id not in self.parked or offer.billing == "per_hour"
        )
        return math.fsum(prices) + self.config.budget.learner_usd_per_hour

    def must_drain(self, drain_s: float, now: float) -> bool:
        """Whether finishing in order, which takes `drain_s`, would use up the budget."""
        return self.budget.verdict(self.usd(now), self.usd_per_hour, drain_s) == "drain"

    # What people see

    def facts(self, now: float) -> dict[str, float]:
        """What was measured and planned, by name; rates in rollouts a second."""
        size, load = self.config.rollout.group_size, self.load()
        facts = {"capacity/rate": self.pacer.rate * size, "capacity/parked": float(len(self.parked))}
        if load is not None:
            interval = min(self.interval, load.max_staleness + 1)
            facts |= {
                "capacity/step_work_s": load.train_s,
                "capacity/bcast_s": load.bcast_s,
                "capacity/stall": load.stall,
                "capacity/rollout_s": load.rollout_s,
                "capacity/margin_s": self.pacer.margin_s,
                "capacity/needed_rate": target_rate(load) * size,
                "capacity/interval": float(interval),
                "capacity/predicted_utilisation": utilisation(load, interval, self.pacer.rate),
            }
        if self.is_priced:
            facts |= {"usd": self.usd(now), "usd_per_hour": self.usd_per_hour, "idle_usd": self.ledger.idle_usd(now)}
        return facts

    def rates(self) -> dict[str, float]:
        """Rollouts a second by node, where they were measured."""
        found = {node_id: self.meter.rate(node_id) for node_id in self._here}
        return {node_id: rate * self.config.rollout.group_size for node_id, rate in found.items() if rate is not None}

    @property
    def is_priced(self) -> bool:
        """Whether anything here costs."""
        return self._spent_before > 0 or any(a.price_usd_per_hour for a in self.ledger.accounts.values())

    def _read(self) -> float:
        path = self._run.path / FILE
        if not path.exists():
            return 0.0
        try:
            return float(json.loads(path.read_text())["usd"])
        except (OSError, ValueError, KeyError, TypeError):
            raise StorageError(
                f"what the run has cost cannot be read from {path}.", 'Write {"usd": 0.0} there, or what it was.'
            ) from None

    def _write(self, now: float) -> None:
        if self.is_priced:
            self._run.write_atomic(FILE, json.dumps({"usd": self.usd(now)}).encode())
