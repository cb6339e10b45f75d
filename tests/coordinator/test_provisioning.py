"""The planner in a run: who is parked, what it costs, when it stops; fed as a run feeds it."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from made import config, new_control, report, submission

from shoal.coordinator.control import MIN_WAIT_S, WAIT_S
from shoal.coordinator.provisioning import Provisioning
from shoal.coordinator.rundir import RunDir
from shoal.errors import StorageError
from shoal.planning.activation import Offer
from shoal.planning.queue import GroupQueue

TRAIN_S = 10.0


def offer(node_id: str, price: float = 0.0, **more: Any) -> Offer:
    return Offer(node_id, rate=0.0, price_usd_per_hour=price, **more)


def make(tmp_path: Path, **changes: Any) -> Provisioning:
    run = RunDir.open(tmp_path / "run") if (tmp_path / "run").exists() else RunDir.create(tmp_path / "run")
    run.write_atomic("config.toml", b"# a test's\n")
    return Provisioning(config(tmp_path, run__steps=10_000, **changes), run)


class Fleet:
    """Workers that take one group at a time and `seconds` for it, and a learner that takes `TRAIN_S` for a step."""

    def __init__(self, planner: Provisioning, workers: dict[Offer, float]) -> None:
        self.planner = planner
        self.workers = workers
        self.now = 0.0
        self.step = 0
        self.num_leases = 0
        self.asked = False

    def play(self, seconds: float) -> None:
        """Everybody who may works all the time; the learner gets its batch when it asks."""
        planner = self.planner
        planner.see(list(self.workers), self.now)
        until = self.now + seconds
        busy: dict[str, tuple[str, float]] = {}
        next_step = self.now
        while self.now < until:
            self.now += 0.5
            for worker, takes_s in self.workers.items():
                lease, ends_at = busy.get(worker.id, ("", 0.0))
                if lease and self.now >= ends_at:
                    planner.ended(lease, self.now, accepted=True)
                    del busy[worker.id]
                if worker.id not in busy and worker.id not in planner.parked:
                    self.num_leases += 1
                    lease = f"l{self.num_leases}"
                    planner.started(lease, worker.id, self.now)
                    busy[worker.id] = (lease, self.now + takes_s)
            if self.now >= next_step:
                planner.asked(self.step, self.now)
                planner.served(self.step, 3, self.now)
                self.step += 1
                next_step = self.now + TRAIN_S
            planner.see(list(self.workers), self.now)
        for lease, _ in busy.values():
            planner.ended(lease, self.now, accepted=False)


def test_workers_without_a_price_are_never_parked(tmp_path: Path) -> None:
    planner = make(tmp_path)
    Fleet(planner, {offer(f"n{i}"): 2.0 for i in range(8)}).play(600)
    assert planner.plan is not None and planner.plan.shortfall == 0
    assert planner.parked == frozenset() and planner.usd(600) == 0 and not planner.is_priced
    assert not (tmp_path / "run/costs.json").exists()


def test_the_cheapest_that_are_enough_work(tmp_path: Path) -> None:
    """A step takes 3 groups in 10 s, a worker makes one in 5 s: two are needed, with headroom."""
    planner = make(tmp_path)
    fleet = Fleet(planner, {offer(f"n{i}", price): 5.0 for i, price in enumerate((1.0, 0.2, 0.9, 0.3, 0.8))})
    fleet.play(900)
    assert planner.parked == {"n0", "n2", "n4"}
    facts = planner.facts(fleet.now)
    assert facts["capacity/needed_rate"] == pytest.approx(3 / TRAIN_S * 4, rel=0.05), "in rollouts, four to a group"
    assert facts["capacity/rate"] == pytest.approx(2 / 5.0 * 4, rel=0.15)
    assert facts["usd_per_hour"] == pytest.approx(0.5)
    assert set(planner.rates()) == {f"n{i}" for i in range(5)}


def test_parking_can_be_turned_off(tmp_path: Path) -> None:
    planner = make(tmp_path, capacity__park=False)
    Fleet(planner, {offer(f"n{i}", 1.0): 5.0 for i in range(5)}).play(600)
    assert planner.plan is not None and planner.parked == frozenset()


def test_a_bound_on_dollars_an_hour_holds_whatever_is_needed(tmp_path: Path) -> None:
    planner = make(tmp_path, budget__max_usd_per_hour=1.5, capacity__park=False)
    Fleet(planner, {offer(f"n{i}", 1.0): 50.0 for i in range(5)}).play(900)
    assert planner.plan is not None and planner.plan.limited_by_budget and planner.usd_per_hour <= 1.5
    assert planner.missing_rate == 0, "more machines are not what is missing"


def test_who_leaves_is_replaced(tmp_path: Path) -> None:
    planner = make(tmp_path)
    fleet = Fleet(planner, {offer(f"n{i}", 1.0): 5.0 for i in range(4)})
    fleet.play(600)
    assert len(planner.parked) == 2
    gone = next(o for o in fleet.workers if o.id not in planner.parked)
    planner.left(gone.id)
    del fleet.workers[gone]
    fleet.play(60)
    assert len(planner.parked) == 1


def test_who_works_again_because_nobody_is_measured_any_more_is_paid_again(tmp_path: Path) -> None:
    planner = make(tmp_path)
    fleet = Fleet(planner, {offer("n0", 0.1): 1.0, offer("n1", 1.0): 1.0})
    fleet.play(300)
    assert planner.parked == {"n1"}
    for node_id in ("n0", "n1"):
        planner.left(node_id)  # both are cut off; one is back before the other is missed
    planner.see([offer("n1", 1.0)], 300.0)
    assert planner.parked == frozenset()
    before = planner.usd(300.0)
    assert planner.usd(300.0 + 3600.0) == pytest.approx(before + 1.0)


def test_too_few_workers_are_told(tmp_path: Path) -> None:
    planner = make(tmp_path)
    Fleet(planner, {offer("n0", 1.0): 20.0}).play(600)
    assert planner.missing_rate == pytest.approx((3 / TRAIN_S - 1 / 20.0) * 4, rel=0.15)


def test_the_bill_is_what_the_tariffs_say(tmp_path: Path) -> None:
    planner = make(tmp_path, budget__learner_usd_per_hour=2.0, budget__egress_usd_per_gb=10.0)
    hourly, used = offer("a", 1.0, billing="per_hour"), offer("b", 0.5, downlink_bytes_per_s=1e6)
    planner.see([hourly, used], 0.0)
    planner.published(1, 1e9, 10.0)
    planner.see([hourly], 1800.0)
    planner.see([hourly], 3700.0)
    assert planner.usd(3700.0) == pytest.approx(2.0 * 3700 / 3600 + 2 * 1.0 + 0.5 * 0.5 + 10.0)
    planner.published(2, 1e9, 3700.0)
    again = make(tmp_path, budget__learner_usd_per_hour=2.0)
    assert again.usd(0.0) == pytest.approx(planner.usd(3700.0)), "a resumed run goes on from there"
    (tmp_path / "run/costs.json").write_text("[]")
    with pytest.raises(StorageError, match="cannot be read"):
        make(tmp_path)


def test_a_parked_hourly_machine_is_given_back_before_its_hour_ends(tmp_path: Path) -> None:
    planner = make(tmp_path)
    hourly = offer("dear", 9.0, billing="per_hour")
    fleet = Fleet(planner, {hourly: 5.0, offer("n0"): 2.0, offer("n1"): 2.0})
    fleet.play(60)
    planner.parked = frozenset({"dear"})
    assert planner.to_release(3000.0) == []
    assert planner.to_release(3590.0) == ["dear"]


def test_the_interval_follows_what_a_snapshot_takes(tmp_path: Path) -> None:
    planner = make(tmp_path, capacity__adapt_interval=True, learner__max_staleness=6)
    fleet = Fleet(planner, {offer(f"n{i}"): 2.0 for i in range(4)})
    fleet.play(60)
    assert planner.interval == 1
    for version in range(1, 30):
        planner.published(version, 0.0, fleet.now)
        for worker in fleet.workers:
            planner.holds(worker.id, version, fleet.now + 25.0)
        fleet.play(100)
    assert planner.interval == 3, "25 s to spread, 10 s a step"


def _ages(tmp_path: Path, *, pace: bool) -> tuple[list[int], set[float]]:
    """Staleness of what is consumed, and the waits, where a group takes a second, and a step of three takes ten."""
    settings = config(tmp_path, eval__before=False, eval__after=False, run__steps=100, capacity__pace=pace)
    control = new_control(settings, tmp_path / "runs" / "tiny")
    waits = {control.lease("ann", 64, 0.0).wait_s}
    assert waits == {WAIT_S}, "nothing is published"
    now, ages = 0.0, []
    for version in range(30):
        control.stepped(report(version), {})
        asked_at, episodes = now, None
        while episodes is None or now < asked_at + TRAIN_S:
            reply = control.lease("ann", 64, now)
            if episodes is None:
                episodes = control.batch(version, now).episodes
                ages += [version - e.version for e in episodes or () if version >= 15]
            if reply.lease is None:
                waits.add(reply.wait_s)
                now += reply.wait_s
                continue
            now += 1.0
            asyncio.run(control.submit(submission(reply.lease, "ann"), "ann", now))
        assert episodes is None or now - asked_at < TRAIN_S + 3.0, "the learner hardly waits"
    return ages, waits


def test_paced_rollouts_are_fresher_and_the_learner_does_not_wait(tmp_path: Path) -> None:
    early, waits = _ages(tmp_path / "early", pace=False)
    assert set(early) == {2} and waits == {WAIT_S}
    fresh, waits = _ages(tmp_path / "fresh", pace=True)
    assert sum(fresh) / len(fresh) < 1.2
    assert len(waits) > 1 and all(MIN_WAIT_S <= wait_s <= WAIT_S for wait_s in waits), "asks again when pacing opens"


class Planning(RuleBasedStateMachine):
    """Random histories of a small fleet: what is promised holds after each event."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.planner = make(Path(self.folder.name), capacity__replan_steps=2, budget__max_usd_per_hour=3.0)
        self.queue = GroupQueue(3, 2, 6)
        self.here: dict[str, Offer] = {}
        self.leases: dict[str, tuple[str, int, int]] = {}
        self.now, self.step, self.published, self.count, self.paid = 0.0, 0, 0, 0, 0.0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(node=st.sampled_from("abcdef"), price=st.sampled_from([0.0, 0.5, 1.0, 2.5]), hourly=st.booleans())
    def join(self, node: str, price: float, hourly: bool) -> None:
        self.here.setdefault(node, offer(node, price, billing="per_hour" if hourly else "per_use"))
        self.planner.see(list(self.here.values()), self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.here)))
        for lease in [i for i, held in self.leases.items() if held[0] == node]:
            self.queue.lost(self.leases.pop(lease)[1])
        self.planner.left(node)
        del self.here[node]
        self.planner.see(list(self.here.values()), self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data(), held=st.integers(0, 3))
    def lease(self, data: st.DataObject, held: int) -> None:
        node = data.draw(st.sampled_from(sorted(self.here)))
        self.planner.holds(node, max(0, self.published - held), self.now)
        if node in self.planner.parked or not self.planner.admits(self.queue, self.now):
            return
        found = self.planner.start(self.queue, node, self.published)
        if found is not None:
            self.count += 1
            assert found[1] <= self.published
            self.leases[f"l{self.count}"] = (node, *found)
            self.planner.started(f"l{self.count}", node, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), accepted=st.booleans())
    def end(self, data: st.DataObject, accepted: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        _, number, version = self.leases.pop(lease)
        self.planner.ended(lease, self.now, accepted=accepted)
        if accepted:
            self.queue.finish(number, version)
        else:
            self.queue.lost(number)

    @rule()
    def learn(self) -> None:
        self.planner.asked(self.step, self.now)
        versions = dict(self.queue.buffered)
        numbers, _ = self.queue.take(self.step)
        if numbers is None:
            return
        assert all(self.step - versions[number] <= 2 for number in numbers)
        self.planner.served(self.step, len(self.queue.buffered), self.now)
        self.step += 1
        self.published = self.step
        self.now += 5.0
        self.planner.published(self.published, 1e6, self.now)

    @rule(seconds=st.floats(0.0, 1000.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.planner.see(list(self.here.values()), self.now)

    @invariant()
    def keeps_its_promises(self) -> None:
        planner = self.planner
        assert all(self.here[node].price_usd_per_hour > 0 for node in planner.parked & self.here.keys())
        usd = planner.usd(self.now)
        assert math.isfinite(usd) and usd >= self.paid - 1e-9, "dollars never fall"
        self.paid = usd
        ledger = planner.ledger
        assert -1e-9 <= ledger.idle_usd(self.now) <= ledger.usd(self.now) + 1e-9
        working = {n for n, account in ledger.accounts.items() if account.active_since is not None}
        assert working == self.here.keys() - planner.parked, "who works is paid, and nobody else"
        if planner.plan is not None and planner.plan.limited_by_budget:
            costs = sum(o.price_usd_per_hour for o in self.here.values() if o.id not in planner.parked)
            assert costs <= 3.0 + 1e-9
        json.dumps(planner.facts(self.now))
        assert all(map(math.isfinite, planner.facts(self.now).values()))

    @invariant()
    def nobody_starves(self) -> None:
        """A learner that waits with nothing running and everybody free to work is given something."""
        free = self.here.keys() - self.planner.parked
        if self.leases or not free or self.step >= 9_999:
            return
        self.planner.asked(self.step, self.now)
        if len(self.queue.buffered) < 3 or self.queue.pending:
            assert self.planner.admits(self.queue, self.now)


class TestPlanning(Planning.TestCase):  # type: ignore[misc]
    settings = hypothesis_settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.slow
def test_a_hundred_thousand_transitions() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Planning, settings=hypothesis_settings(max_examples=1000, stateful_step_count=100, deadline=None)
    )
