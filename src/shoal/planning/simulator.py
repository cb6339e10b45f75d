"""A run in simulated time: thousands of workers against one learner, by discrete events.

It *drives the code that runs drive*: admission and the sweep (`GroupQueue`), leases (`LeaseBook`), pacing (`Pacer`),
the workers' measured rates (`RateMeter`), the capacity model, activation and the ledger. Only what those are told is
made up: how long a lease takes, when a snapshot arrives, which machine is taken away. What it shows is a simulation.

    finish ──▶ a slot is free ──▶ dispatch ──▶ pacing, admission ──▶ a lease ──▶ finish …
    learner: ask ──▶ sweep, batch ──▶ T_train ──▶ version + 1, every κ published ──▶ ask …
    a publication reaches link classes one by one; only then may their workers start under it

Simplifications: workers of the same region and downlink share an arrival time; snapshots spread one after the other,
and a newer one overtakes what still waits; slots of a worker do not slow each other; nothing is rejected.
Deterministic by `Scenario.seed`. Invariant: nothing staler than S is consumed (`Outcome.violations`), and both
conservation laws hold.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shoal.errors import RunError
from shoal.planning.activation import Offer, replan
from shoal.planning.billing import HOUR_S, Ledger
from shoal.planning.capacity import Load, publish_interval, target_rate, utilisation
from shoal.planning.leases import LeaseBook
from shoal.planning.pacing import Pacer
from shoal.planning.queue import GroupQueue
from shoal.planning.rates import RateMeter
from shoal.planning.scenario import Outcome, Scenario
from shoal.planning.simulated import Links, Mean, Means, Publications, Work, demand, offers_of, step_s, stretches

LEARNER = "learner"

PACE_SHARE = 1 / 200
"""Waiting workers ask again this often in a step: a real one polls as well."""

WARM_UP_SHARE = 0.1
"""The first steps, S + 2 of them at least, are not measured; nor are the last S + 2, in which no new work starts."""

EVENTS_PER_LEASE, BASE_EVENTS = 100, 100_000
"""A run that takes more events than these for its leases makes no headway; a healthy one takes one or two a lease."""

FINISH, TRAINED, ARRIVED, SPREAD, WAKE, PACE, LOST, SEEN, RETURNED, JOINED = range(10)
"""Events."""


class Simulator:
    """One simulated run; `run` plays it to its end."""

    def __init__(self, scenario: Scenario) -> None:
        s = self.scenario = scenario
        self.window = s.window or (s.max_staleness + 2) * s.leases_per_step
        self.queue = GroupQueue(s.leases_per_step, s.max_staleness, self.window)
        self.book = LeaseBook()
        self.pacer = Pacer(s.leases_per_step, s.max_staleness)
        self.meter = RateMeter()
        self.ledger = Ledger()
        self.outcome = Outcome()
        self.now = 0.0
        self.step = 0
        self._events: list[tuple[float, int, int, object]] = []
        self._num_events = 0
        self._random = np.random.default_rng(s.seed)
        self._stretch = stretches(scenario, self._random)
        self.means = Means()
        self.links = Links(scenario)
        self._waiting = True
        self._window_end = math.inf
        self._busy_from = 0.0
        self._warm_steps = max(s.max_staleness + 2, int(WARM_UP_SHARE * s.steps))
        self._cool_step = s.steps - (s.max_staleness + 2)
        assert self._warm_steps < self._cool_step, "the run is shorter than its warm-up and its end"
        self._trained_s = 0.0
        self._done: dict[int, tuple[int, float]] = {}
        """Buffered leases: version and duration."""
        self._kept, self._swept = Mean(), Mean()
        self._attempts = 0
        self._pace_timer = math.inf
        self.publications = Publications(scenario, self.links, self.ledger)
        n = len(s.machines)
        self.active, self.ready, self.present = [False] * n, [False] * n, [True] * n
        self.busy, self.life, self.stamp = [0] * n, [0] * n, [0] * n
        self.index = {m.id: i for i, m in enumerate(s.machines)}
        assert len(self.index) == n, "machines share an id"
        self.idle: list[deque[tuple[int, int]]] = [deque() for _ in range(len(self.links))]
        self._needed_rate = 0.0

    # The run

    def run(self) -> Outcome:
        """Play the run and say what it came to."""
        s = self.scenario
        self.ledger.add(LEARNER, s.learner_usd_per_hour, "per_use")
        self.ledger.activate(LEARNER, 0.0)
        for machine in s.machines:
            self.ledger.add(machine.id, machine.price_usd_per_hour, machine.billing, s.egress_usd_per_byte)
            if machine.committed:
                self.ledger.acquire(machine.id, 0.0)
        self.interval = s.interval or publish_interval(self._load([]))
        self._replan()
        self._ask()
        handlers: tuple[Callable[[Any], None], ...] = (
            self._finish, self._trained, self._arrived, self._spread, self._dispatch,
            self._pace, self._lose, self._seen, self._return, self._join,
        )  # fmt: skip
        most_events = EVENTS_PER_LEASE * s.steps * s.leases_per_step + 100 * len(s.machines) + BASE_EVENTS
        while self.step < s.steps:
            if not self._events or self._num_events > most_events:
                raise RunError(
                    f"The simulated run does not get beyond step {self.step}: its workers are too few, too dear "
                    "for the budget, or lost sooner than they finish.",
                    "Give it more or steadier machines.",
                )
            self.now, _, kind, what = heapq.heappop(self._events)
            handlers[kind](what)
        return self._conclude()

    def _at(self, time: float, kind: int, what: object = None) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, kind, what))

    # Workers

    def _dispatch(self, link: int) -> None:
        """Give the idle workers of a link class what pacing and admission allow."""
        idle = self.idle[link]
        if self.now < self.links.resumes_at[link]:
            return
        paced, queue = self.scenario.paced, self.queue
        while idle:
            worker, stamp = idle[0]
            if stamp != self.stamp[worker]:
                idle.popleft()
                continue
            if paced and not self.pacer.admits(queue, self.now):
                self._schedule_pace()
                return
            number = queue.start(self.links.held[link], self.scenario.steps)
            if number is None:
                return
            idle.popleft()
            self._start(worker, number, link)

    def _dispatch_all(self) -> None:
        for link in range(len(self.idle)):
            self._dispatch(link)

    def _start(self, worker: int, number: int, link: int) -> None:
        machine = self.scenario.machines[worker]
        self._attempts += 1
        lease = f"{number}.{self._attempts}"
        self.book.grant(lease, machine.id, 1, math.inf, self.now)
        self.meter.started(machine.id, self.now)
        self.means.weigh(self.now)
        self.busy[worker] += 1
        self.means.num_busy += 1
        duration_s = machine.slots / machine.rate * next(self._stretch)
        links = self.links
        work = Work(lease, number, links.held[link], worker, self.life[worker], self.now, links.stalled_s[link])
        self._at(self.now + duration_s, FINISH, work)

    def _finish(self, work: Work) -> None:
        worker, link = work.worker, self.links.of[work.worker]
        if work.life != self.life[worker]:
            return
        owed = self.links.stalled_s[link] - work.stalled_s
        if owed > 0:
            self._at(self.now + owed, FINISH, work._replace(stalled_s=self.links.stalled_s[link]))
            return
        name = self.scenario.machines[worker].id
        duration_s = self.now - work.started_at
        self.book.finish(work.lease, name, accepted=1, rejected=0, void=0)
        self.queue.finish(work.number, work.version)
        self.meter.ended(name, 1, self.now)
        self.pacer.finished(duration_s, self.now)
        self._done[work.number] = (work.version, duration_s)
        self.means.weigh(self.now)
        self.busy[worker] -= 1
        self.means.num_busy -= 1
        if self.ready[worker]:
            self.idle[link].append((worker, self.stamp[worker]))
        enough = len(self.queue.buffered) >= self.scenario.leases_per_step
        if self._waiting and enough and work.number < self._window_end:
            self._take()
        self._dispatch(link)

    def _schedule_pace(self) -> None:
        opens_at = max(self.pacer.opens_at(self.queue.ahead), self.now + PACE_SHARE * self.scenario.train_s)
        if opens_at < self._pace_timer:
            self._pace_timer = opens_at
            self._at(opens_at, PACE)

    def _pace(self, _: object) -> None:
        if self.now >= self._pace_timer:
            self._pace_timer = math.inf
            self._dispatch_all()

    def _lose(self, what: tuple[int, int]) -> None:
        worker, life = what
        if life != self.life[worker] or not self.active[worker]:
            return
        self._set_active(worker, False)
        self.present[worker] = False
        self.life[worker] += 1
        self.ledger.release(self.scenario.machines[worker].id, self.now)
        self.means.weigh(self.now)
        self.means.num_busy -= self.busy[worker]
        self.busy[worker] = 0
        self._at(self.now + self.scenario.detection_s, SEEN, worker)
        away = self._random.exponential(self.scenario.machines[worker].absent_s)
        self._at(self.now + self.scenario.detection_s + away, RETURNED, worker)

    def _seen(self, worker: int) -> None:
        """The coordinator notices that a worker is lost: what it held is leased again."""
        name = self.scenario.machines[worker].id
        for holding in self.book.void_node(name):
            self.queue.lost(int(holding.lease_id.partition(".")[0]))
        self.meter.left(name)
        self._replan_if_stuck()
        self._dispatch_all()

    def _return(self, worker: int) -> None:
        self.present[worker] = True
        if not self.scenario.activation:
            self._set_active(worker, True)
        self._replan_if_stuck()

    def _join(self, what: tuple[int, int]) -> None:
        """An activated worker has fetched the policy."""
        worker, stamp = what
        if stamp != self.stamp[worker] or self.ready[worker]:
            return
        self.ready[worker] = True
        free = self.scenario.machines[worker].slots - self.busy[worker]
        self.idle[self.links.of[worker]].extend([(worker, stamp)] * free)
        self._dispatch(self.links.of[worker])

    # Activation

    def _set_active(self, worker: int, active: bool) -> None:
        if self.active[worker] == active:
            return
        machine = self.scenario.machines[worker]
        self.means.weigh(self.now)
        self.active[worker], self.ready[worker] = active, False
        self.stamp[worker] += 1
        sign = 1 if active else -1
        rate = self.meter.expected(machine.id, machine.rate)
        self.means.active_rate += sign * machine.rate
        self.pacer.rate = max(0.0, self.pacer.rate + sign * rate)
        self.means.num_active += sign
        self.means.num_slots += sign * machine.slots
        if not active:
            (self.ledger.park if machine.committed else self.ledger.release)(machine.id, self.now)
            return
        self.ledger.activate(machine.id, self.now)
        fetch_s = 0.0 if self.now == 0 else self.publications.arrival_s(self.links.of[worker], self.active, self.now)
        self._at(self.now + fetch_s, JOINED, (worker, self.stamp[worker]))
        if machine.losses_per_hour > 0:
            lost_after_s = self._random.exponential(HOUR_S / machine.losses_per_hour)
            self._at(self.now + lost_after_s, LOST, (worker, self.life[worker]))

    @property
    def _is_short(self) -> bool:
        """Whether the active workers are fewer than the last plan needed, so that it should not stand."""
        few = self.means.num_active == 0 or self.pacer.rate < self._needed_rate
        return self.scenario.activation and few

    def _replan_if_stuck(self) -> None:
        """A learner that waits has no end of a step at which to plan again."""
        if self._waiting and self._is_short:
            self._replan()

    def _replan(self) -> None:
        """Decide who is active, by what was measured so far."""
        s = self.scenario
        if not s.activation:
            for worker in range(len(s.machines)):
                self._set_active(worker, self.present[worker])
            return
        offers = offers_of(s, self.present, self.meter, self.ledger, self.interval, self.now)
        current = frozenset(s.machines[i].id for i, active in enumerate(self.active) if active)
        plan = replan(
            current,
            offers,
            lambda active: target_rate(self._load(active)),
            headroom=s.headroom,
            max_usd_per_hour=s.max_usd_per_hour,
        )
        for offer in offers:
            self._set_active(self.index[offer.id], offer.id in plan.active)
        if s.interval is None:
            self.interval = publish_interval(self._load([o for o in offers if o.id in plan.active]))
        self.pacer.rate = plan.rate
        self._needed_rate = 0.0 if plan.shortfall else plan.needed

    def _load(self, active: Sequence[Offer]) -> Load:
        return demand(self.scenario, active, self.pacer.train_s, self.pacer.lead_s)

    # The learner

    def _ask(self) -> None:
        self._waiting = True
        self.pacer.asked(self.step, self.now)
        self._take()
        self._dispatch_all()

    def _take(self) -> None:
        numbers, swept = self.queue.take(self.step)
        for number in swept:
            _, duration_s = self._done.pop(number)
            self._swept.add(duration_s)
        self._window_end = math.inf
        if numbers is None:
            if len(self.queue.buffered) >= self.scenario.leases_per_step:
                # Only what lies in the window can complete the batch or move the window.
                self._window_end = self.queue.oldest_open(self.step) + self.window
            return
        self._waiting = False
        self.pacer.served(self.step, len(self.queue.buffered) + len(numbers), self.now)
        for number in numbers:
            version, duration_s = self._done.pop(number)
            age = self.step - version
            self.outcome.violations += age > self.scenario.max_staleness
            if self.means.measuring:
                self.outcome.staleness[age] += 1
                self._kept.add(duration_s)
        if self.means.began_at is None and self.step >= self._warm_steps:
            self.means.begin(self.now)
        self._busy_from = self.now
        self._at(self.now + step_s(self.scenario, self._random), TRAINED)

    def _trained(self, _: object) -> None:
        if self.means.measuring:
            self._trained_s += self.now - self._busy_from
        self.step += 1
        if self.step == self._cool_step:
            self.means.end(self.now)
        if self.step >= self.scenario.steps:
            return
        if self.step % self.interval == 0:
            self._publish(self.step)
        if self._is_short or self.step % self.scenario.replan_steps == 0:
            self._replan()
        self._ask()

    # Publication

    def _publish(self, version: int) -> None:
        spread = self.publications.publish(version, self.active, self.now)
        for link, stall_s, arrival_s in spread:
            if stall_s > 0:
                self._at(self.now + stall_s, WAKE, link)
            self._at(self.now + arrival_s, ARRIVED, (link, version))
        if spread:
            self._at(self.now + self.publications.took_s[-1], SPREAD)

    def _spread(self, _: object) -> None:
        version = self.publications.over()
        if version is not None:
            self._publish(version)

    def _arrived(self, what: tuple[int, int]) -> None:
        link, version = what
        self.links.held[link] = max(self.links.held[link], version)
        self._dispatch(link)

    # The end

    def _conclude(self) -> Outcome:
        out, s, means, measured = self.outcome, self.scenario, self.means, self.means.measured_s
        out.steps, out.elapsed_s, out.interval, out.events = self.step, self.now, self.interval, self._num_events
        out.bcast_s = self.publications.mean_s
        out.utilisation = self._trained_s / measured
        out.step_s = measured / (self._cool_step - self._warm_steps)
        out.active_rate, out.active_workers = means.rate_s / measured, means.active_s / measured
        out.worker_utilisation = means.busy_s / means.slot_s if means.slot_s else 0.0
        load = Load(s.leases_per_step, s.train_s, out.bcast_s, s.max_staleness, s.stall, s.rollout_s)
        out.predicted_utilisation = utilisation(load, min(self.interval, s.max_staleness + 1), out.active_rate)
        assert self.book.is_conserved
        out.counts.update(self.book.counts)
        out.counts.update({name: self.queue.counts[name] for name in ("consumed", "swept")})
        out.counts.update(running=self.book.num_running, buffered=len(self.queue.buffered))
        out.mean_duration_kept_s = self._kept.mean
        out.mean_duration_swept_s = self._swept.mean
        out.usd, out.idle_usd = self.ledger.usd(self.now), self.ledger.idle_usd(self.now)
        out.egress_usd = self.ledger.egress_usd
        out.worker_usd = out.usd - out.egress_usd - self.ledger.accounts[LEARNER].rental_usd(self.now)
        return out


def simulate(scenario: Scenario) -> Outcome:
    """Play one scenario."""
    return Simulator(scenario).run()
