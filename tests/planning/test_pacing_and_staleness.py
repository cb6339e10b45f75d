"""Pacing, admission, sweep, leases and the log of batches together, under random histories.

A run is a learner that may be killed and go back to a checkpoint, workers of random speed that may die, stall, submit
late or twice or for others, and a publisher with delays. Every event checks all the invariants.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.planning.leases import LeaseBook
from shoal.planning.pacing import Pacer
from shoal.planning.queue import GroupQueue

TRANSITIONS = Counter[str]()
"""Events of all histories, so that a test can say how many there were."""


class Run(RuleBasedStateMachine):
    """Everything that decides who acts on what, and a world that does its worst."""

    book: LeaseBook

    @initialize(
        groups=st.integers(1, 4), bound=st.integers(0, 4), steps=st.integers(3, 30), seed=st.integers(0, 2**32),
        paced=st.booleans(),
    )  # fmt: skip
    def begin(self, groups: int, bound: int, steps: int, seed: int, paced: bool) -> None:
        self.rng = random.Random(seed)
        self.groups, self.bound, self.steps, self.paced = groups, bound, steps, paced
        self.interval = self.rng.randint(1, max(1, bound))
        self.queue = GroupQueue(groups, bound, window=groups * self.rng.randint(1, bound + 2))
        self.book, self.pacer = LeaseBook(), Pacer(groups, bound)
        self.now = 0.0
        self.step = 0
        self.published = 0
        self.unpublished: list[int] = []
        self.batches: list[list[int]] = []
        """The log: batch t is formed once and handed out as often as the learner asks for it."""
        self.checkpoint = 0
        self.number_of: dict[str, int] = {}
        self.version_of: dict[str, int] = {}
        self.started_at: dict[str, float] = {}
        self.node_of: dict[str, str] = {}
        self.drawn_under: dict[int, int] = {}
        self.ended: list[str] = []
        self.accepted: set[int] = set()
        self.swept: set[int] = set()
        self.num_leases = 0

    # Workers

    def grant(self, node: str, lag: int) -> str | None:
        """A worker asks for work; its policy may be `lag` publications old, then it is refused what it can't make."""
        if not self.pacer.admits(self.queue, self.now) and self.paced:
            return None
        pending, ahead = bool(self.queue.pending), self.queue.ahead
        number = self.queue.start(self.published, self.steps)
        if number is None:
            return None
        assert pending or ahead < (self.published + self.bound + 1) * self.groups
        lease = f"g{number}.{self.num_leases}"
        self.num_leases += 1
        self.book.grant(lease, node, 1, self.rng.uniform(1, 20), self.now)
        self.number_of[lease], self.version_of[lease] = number, self.published
        self.started_at[lease], self.node_of[lease] = self.now, node
        return lease

    @rule(times=st.integers(1, 12))
    def ask(self, times: int) -> None:
        for _ in range(times):
            self.grant(f"n{self.rng.randrange(4)}", 0)
            TRANSITIONS["ask"] += 1

    @precondition(lambda self: self.book.running)
    @rule(times=st.integers(1, 8))
    def finish(self, times: int) -> None:
        for _ in range(times):
            if self.book.running:
                self.submit(self.rng.choice(list(self.book.running)))

    def submit(self, lease: str) -> None:
        TRANSITIONS["submit"] += 1
        number = self.number_of[lease]
        assert self.book.finish(lease, self.node_of[lease], accepted=1, rejected=0, void=0)
        assert number not in self.accepted, "a group is accepted once"
        self.accepted.add(number)
        self.drawn_under[number] = self.version_of[lease]
        self.queue.finish(number, self.version_of[lease])
        self.pacer.finished(self.now - self.started_at[lease], self.now)
        self.ended.append(lease)

    @precondition(lambda self: self.ended)
    @rule(times=st.integers(1, 6))
    def submit_again_or_late(self, times: int) -> None:
        for _ in range(times):
            TRANSITIONS["again"] += 1
            lease = self.rng.choice(self.ended)
            counts = self.book.counts.copy()
            assert not self.book.finish(lease, self.node_of[lease], accepted=1, rejected=0, void=0)
            assert not self.book.progress(lease, self.node_of[lease], 10**6, self.now)
            assert self.book.counts == counts

    @precondition(lambda self: self.book.running)
    @rule(times=st.integers(1, 6))
    def heartbeat(self, times: int) -> None:
        for _ in range(times):
            TRANSITIONS["beat"] += 1
            lease = self.rng.choice(list(self.book.running))
            node = self.node_of[lease] if self.rng.random() < 0.8 else "another"
            held = node == self.node_of[lease]
            assert self.book.progress(lease, node, self.rng.randrange(50), self.now) == held

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        TRANSITIONS["time"] += 1
        self.now += seconds
        self._lost([h.lease_id for h in self.book.expire(self.now)])

    @rule(node=st.integers(0, 3))
    def node_dies(self, node: int) -> None:
        TRANSITIONS["die"] += 1
        self._lost([h.lease_id for h in self.book.void_node(f"n{node}")])

    def _lost(self, leases: list[str]) -> None:
        for lease in leases:
            self.queue.lost(self.number_of[lease])
            self.ended.append(lease)

    # The learner

    @precondition(lambda self: self.step < self.steps)
    @rule(times=st.integers(1, 3), train_s=st.floats(0.1, 10))
    def learn(self, times: int, train_s: float) -> None:
        for _ in range(times):
            if self.step < self.steps:
                self.take(train_s)

    def take(self, train_s: float) -> bool:
        TRANSITIONS["take"] += 1
        self.pacer.asked(self.step, self.now)
        if self.step == len(self.batches):
            numbers, swept = self.queue.take(self.step)
            for number in swept:
                assert self.step - self.drawn_under[number] > self.bound and number not in self.swept
                self.swept.add(number)
            if numbers is None:
                return False
            consumed = {n for batch in self.batches for n in batch}
            assert len(set(numbers)) == self.groups and not (consumed | self.swept) & set(numbers)
            self.batches.append(numbers)
        self.pacer.served(self.step, len(self.queue.buffered) + self.groups, self.now)
        for number in self.batches[self.step]:
            assert 0 <= self.step - self.drawn_under[number] <= self.bound, "nothing staler than S is consumed"
        self.now += train_s
        self.step += 1
        if self.step % self.interval == 0 or self.step == self.steps:
            if self.step > max([self.published, *self.unpublished]):
                self.unpublished.append(self.step)
            if self.rng.random() < 0.5:
                self.checkpoint = self.step
        return True

    @precondition(lambda self: self.unpublished)
    @rule()
    def publish(self) -> None:
        TRANSITIONS["publish"] += 1
        # Versions may be skipped on the way; they never come out of order.
        skipped = self.rng.randrange(len(self.unpublished))
        self.published = self.unpublished[skipped]
        del self.unpublished[: skipped + 1]

    @rule()
    def learner_is_killed(self) -> None:
        """It goes back to its checkpoint and asks for the batches since then again: the same ones."""
        TRANSITIONS["kill learner"] += 1
        self.step = self.checkpoint

    @rule()
    def coordinator_is_killed(self) -> None:
        """Running leases are gone; their groups wait again. The pacer has measured nothing."""
        TRANSITIONS["kill coordinator"] += 1
        self.ended += list(self.book.running)
        for node in {h.node_id for h in self.book.running.values()}:
            self.book.void_node(node)
        old, self.queue = self.queue, GroupQueue(self.groups, self.bound, self.queue.window)
        self.queue.next_number, self.queue.counts = old.next_number, old.counts
        self.queue.buffered, self.queue.pending = old.buffered, sorted({*old.pending, *old.running})
        self.pacer = Pacer(self.groups, self.bound)

    # What always holds

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "rng"):
            return
        assert self.book.is_conserved and self.book.num_running == len(self.queue.running)
        counts = self.queue.counts
        assert counts["accepted"] == len(self.accepted)
        assert counts["accepted"] == counts["consumed"] + counts["swept"] + len(self.queue.buffered)
        assert counts["consumed"] == len(self.batches) * self.groups
        assert self.queue.oldest_open(len(self.batches)) >= min(
            [*self.queue.pending, *self.queue.running], default=self.queue.next_number
        )

    def teardown(self) -> None:
        """Nobody starves: from any state, workers that finish what they start bring the run to its end."""
        if not hasattr(self, "rng"):
            return
        for _ in range(60 * (self.steps + 1)):
            if self.step == self.steps:
                return
            while self.grant("n0", 0) is not None:
                TRANSITIONS["ask"] += 1
            for lease in sorted(self.book.running, key=lambda name: self.number_of[name]):
                self.now += 0.1
                self.submit(lease)
            self.take(1.0)
            while self.unpublished:
                self.publish()
            self.now += 1.0
        pytest.fail(f"no end is in sight at step {self.step} of {self.steps}")


def histories(examples: int, steps: int) -> int:
    TRANSITIONS.clear()
    Run.TestCase.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    Run.TestCase().runTest()
    return TRANSITIONS.total()


def test_random_histories() -> None:
    assert histories(60, 50) > 3_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_transitions() -> None:
    assert histories(1200, 60) >= 100_000


# Pacing alone


def measured(groups: int, bound: int, *, train_s: float, duration_s: float, rate: float) -> Pacer:
    """A pacer that has seen ten steps, each asked for the moment the one before was done."""
    pacer = Pacer(groups, bound, rate=rate)
    for step in range(10):
        now = step * train_s
        for _ in range(groups):
            pacer.finished(duration_s, now)
        pacer.asked(step, now)
        pacer.served(step, groups, now)
    return pacer


def test_a_group_starts_just_in_time() -> None:
    """Step 12 begins at 120; a group takes 4 s; 5 of its 8 are still to start, at 4 a second."""
    pacer = measured(8, 4, train_s=10.0, duration_s=4.0, rate=4.0)
    assert pacer.train_s == 10.0 and pacer.lead_s == 4.0 and pacer.margin_s == 0.0
    assert pacer.opens_at(12 * 8 + 3) == pytest.approx(120 - 4 - 5 / 4)
    assert pacer.opens_at(9 * 8 + 7) == -math.inf, "what the running step needed is not held back"


def test_slow_workers_are_never_held_back() -> None:
    """R/Λ = 16 s > T_train: what the next steps need opens at once, though they are not due yet."""
    pacer = measured(8, 3, train_s=10.0, duration_s=4.0, rate=0.5)
    assert all(pacer.opens_at(ahead) <= 90.0 for ahead in range((9 + 2) * 8))


def test_opening_times_never_fall() -> None:
    for rate in (0.3, 0.8, 1.0, 2.0, 50.0):
        pacer = measured(8, 5, train_s=10.0, duration_s=4.0, rate=rate)
        times = [pacer.opens_at(ahead) for ahead in range(8 * 15)]
        assert times == sorted(times)


def test_nothing_measured_or_nothing_to_gain_delays_nothing() -> None:
    assert Pacer(8, 4).opens_at(10**6) == -math.inf
    assert measured(8, 0, train_s=10.0, duration_s=4.0, rate=4.0).opens_at(10**6) == -math.inf
    queue = GroupQueue(8, 4, 16)
    queue.start(0, 9)
    queue.lost(0)
    assert measured(8, 4, train_s=10.0, duration_s=400.0, rate=4.0).admits(queue, -1e9), "lost work is never delayed"


def test_a_wait_raises_the_margin_and_steady_slack_lowers_it() -> None:
    pacer = measured(8, 4, train_s=10.0, duration_s=4.0, rate=4.0)
    pacer.asked(10, 100.0)
    pacer.served(10, 8, 103.0)
    assert pacer.margin_s == pytest.approx(3.0)
    for step in range(11, 60):
        now = 103.0 + 10 * (step - 10)
        for _ in range(8):
            pacer.finished(4.0, now - 5.0)
        pacer.asked(step, now)
        pacer.served(step, 8, now)
    assert pacer.margin_s == pytest.approx(-pacer.lead_s), "slack of 5 s at every step is used up, within its limit"


def test_a_reserve_is_left() -> None:
    pacer = measured(8, 4, train_s=10.0, duration_s=4.0, rate=4.0)
    for step in range(10, 60):
        now = 100.0 + 10 * (step - 10)
        for _ in range(8):
            pacer.finished(4.0, now - 2.0)
        pacer.asked(step, now)
        pacer.served(step, 8, now)
    assert pacer.margin_s == 0.0, "2 s of 10 are less than the reserve"
