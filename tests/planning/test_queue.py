"""The queue of groups under random workers, losses and publications: the staleness bound, counts, and no deadlock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.planning.queue import GroupQueue


class Run:
    """A learner, workers and a queue, one event at a time. The invariants are asserted as it goes.

    Args:
        publish_every: κ. Version x can be had by workers only after the learner made and published it.
    """

    def __init__(self, groups: int, bound: int, publish_every: int, window: int, last_step: int) -> None:
        self.queue = GroupQueue(groups_per_step=groups, max_staleness=bound, window=window)
        self.groups, self.bound, self.publish_every, self.last_step = groups, bound, publish_every, last_step
        self.step = 0
        self.published = 0
        self.unpublished: list[int] = []
        self.version_of: dict[int, int] = {}
        self.consumed: list[int] = []
        self.swept: list[int] = []
        self.started: set[int] = set()
        self.staleness: list[int] = []
        self.num_accepted = 0

    @property
    def done(self) -> bool:
        return self.step == self.last_step

    def start(self) -> int | None:
        pending = list(self.queue.pending)
        ahead = len(self.consumed) + len(self.queue.buffered) + len(self.queue.running)
        number = self.queue.start(self.published, self.last_step)
        if number is None:
            return None
        if pending:
            assert number == min(pending), "what was lost goes first, the oldest of it"
        else:
            assert number not in self.started
            assert ahead < (self.published + self.bound + 1) * self.groups, "the admission bound"
            assert ahead < self.last_step * self.groups, "no more groups than the run can consume"
        self.started.add(number)
        self.version_of[number] = self.published
        return number

    def finish(self, number: int) -> None:
        self.queue.finish(number, self.version_of[number])
        self.num_accepted += 1

    def take(self) -> bool:
        """The learner asks for a batch; with one, it makes the next version."""
        numbers, swept = self.queue.take(self.step)
        gone = set(self.consumed) | set(self.swept)
        assert not gone & set(swept) and all(self.step - self.version_of[n] > self.bound for n in swept)
        self.swept += swept
        if numbers is None:
            return False
        assert len(numbers) == len(set(numbers)) == self.groups, "a batch has exactly R groups"
        assert not (gone | set(swept)) & set(numbers), "no group is consumed twice, or after it was swept"
        ages = [self.step - self.version_of[n] for n in numbers]
        assert max(ages) <= self.bound, "nothing staler than S is consumed"
        # What was started under a version that is too old by now holds nobody up.
        hopeful = [n for n in self.queue.running if self.step - self.version_of[n] <= self.bound]
        still_open = [*self.queue.pending, *hopeful]
        assert max(numbers) < min(still_open, default=self.queue.next_number) + self.queue.window
        self.consumed += numbers
        self.staleness += ages
        self.step += 1
        if self.step % self.publish_every == 0 or self.done:
            self.unpublished.append(self.step)
        return True

    def publish(self) -> None:
        """Publication takes its time; versions come out in order."""
        self.published = self.unpublished.pop(0)

    def check(self) -> None:
        counts = self.queue.counts
        assert counts["accepted"] == self.num_accepted
        assert counts["accepted"] == counts["consumed"] + counts["swept"] + len(self.queue.buffered)
        assert counts["consumed"] == len(self.consumed) == self.step * self.groups
        assert counts["swept"] == len(self.swept)
        assert not self.queue.running & set(self.queue.pending) and not self.queue.running & set(self.queue.buffered)

    def finishes(self) -> None:
        """From here, workers that finish what they start and a learner that takes what there is reach the end."""
        for _ in range(50 * (self.last_step + 1) * self.groups):
            if self.done:
                return
            while self.start() is not None:
                pass
            for number in sorted(self.queue.running):
                self.finish(number)
            moved = self.take()
            while self.unpublished:
                self.publish()
            self.check()
            assert moved or self.queue.running or self.queue.pending or self._can_start(), "deadlock"
        pytest.fail("no end is in sight")

    def _can_start(self) -> bool:
        number = self.start()
        if number is not None:
            self.queue.lost(number)
        return number is not None


class Queue(RuleBasedStateMachine):
    """Any order of starts, ends, losses, publications and steps."""

    run_: Run

    @initialize(groups=st.integers(1, 4), bound=st.integers(0, 4), data=st.data(), steps=st.integers(1, 12))
    def begin(self, groups: int, bound: int, data: st.DataObject, steps: int) -> None:
        publish_every = data.draw(st.integers(1, max(1, bound)))
        window = data.draw(st.integers(groups, 4 * groups))
        self.run_ = Run(groups, bound, publish_every, window, steps)

    @rule(times=st.integers(1, 6))
    def start(self, times: int) -> None:
        for _ in range(times):
            self.run_.start()

    @precondition(lambda self: self.run_.queue.running)
    @rule(data=st.data(), times=st.integers(1, 5))
    def finish(self, data: st.DataObject, times: int) -> None:
        for _ in range(min(times, len(self.run_.queue.running))):
            self.run_.finish(data.draw(st.sampled_from(sorted(self.run_.queue.running))))

    @precondition(lambda self: self.run_.queue.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.run_.queue.lost(data.draw(st.sampled_from(sorted(self.run_.queue.running))))

    @precondition(lambda self: not self.run_.done)
    @rule()
    def take(self) -> None:
        self.run_.take()

    @precondition(lambda self: self.run_.unpublished)
    @rule()
    def publish(self) -> None:
        self.run_.publish()

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "run_"):
            self.run_.check()

    def teardown(self) -> None:
        if hasattr(self, "run_"):
            self.run_.finishes()


def test_the_queue_under_random_histories() -> None:
    _run(examples=200)


@pytest.mark.slow
def test_the_queue_under_many_random_histories() -> None:
    _run(examples=2000)


def _run(*, examples: int) -> None:
    Queue.TestCase.settings = settings(max_examples=examples, stateful_step_count=60, deadline=None)
    case = Queue.TestCase()
    case.runTest()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), bound=st.integers(0, 3), groups=st.integers(1, 4))
def test_runs_with_workers_of_random_speeds_end(seed: int, bound: int, groups: int) -> None:
    """Whole runs in simulated time: no rollout is sampled in vain where nothing is lost and publication is prompt."""
    rng = random.Random(seed)
    publish_every = rng.randint(1, max(1, bound))
    run = Run(groups, bound, publish_every, rng.randint(groups, 3 * groups), last_step=10)
    speeds = [rng.uniform(0.2, 5.0) for _ in range(rng.randint(1, 5))]
    now, train_s, learner_free = 0.0, rng.uniform(0.1, 3.0), 0.0
    busy: dict[int, tuple[float, int]] = {}
    for _ in range(5000):
        if run.done:
            break
        for worker, speed in enumerate(speeds):
            if worker not in busy and (number := run.start()) is not None:
                busy[worker] = (now + rng.expovariate(1 / speed), number)
        if now >= learner_free:
            while run.unpublished:
                run.publish()
            if run.take():
                learner_free = now + train_s
        events = [end for end, _ in busy.values()] + ([learner_free] if learner_free > now else [])
        now = min(events, default=now + 0.1)
        for worker in [w for w, (end, _) in busy.items() if end <= now]:
            run.finish(busy.pop(worker)[1])
        run.check()
    assert run.done
    assert max(run.staleness) <= bound
    if bound == 0:
        assert set(run.staleness) == {0} and not run.swept, "S = 0 is strictly on-policy, and wastes nothing"


def test_slow_groups_hold_up_only_what_lies_beyond_the_window() -> None:
    queue = GroupQueue(groups_per_step=2, max_staleness=9, window=4)
    numbers = [queue.start(0, 100) for _ in range(8)]
    assert numbers == list(range(8))
    for quick in (1, 2, 3):
        queue.finish(quick, 0)
    assert queue.take(0) == ([1, 2], []), "group 0 is slow, and holds nobody up inside the window"
    for quick in (4, 5, 6, 7):
        queue.finish(quick, 0)
    assert queue.take(1) == (None, []), "4 and later lie beyond 0 + 4, so short groups cannot overtake for ever"
    queue.finish(0, 0)
    assert queue.take(1) == ([0, 3], [])


def test_a_lost_group_is_started_again_before_new_ones_even_where_admission_is_closed() -> None:
    queue = GroupQueue(groups_per_step=1, max_staleness=0, window=1)
    assert queue.start(0, 5) == 0 and queue.start(0, 5) is None
    queue.lost(0)
    assert queue.start(0, 5) == 0 and queue.start(0, 5) is None


def test_what_went_stale_is_replaced_by_a_new_draw() -> None:
    queue = GroupQueue(groups_per_step=1, max_staleness=1, window=9)
    assert [queue.start(0, 9) for _ in range(3)] == [0, 1, None]
    queue.finish(1, 0)
    assert queue.take(0) == ([1], [])
    assert queue.start(1, 9) == 2
    queue.finish(2, 1)
    assert queue.take(1) == ([2], [])
    queue.finish(0, 0)
    assert queue.take(2) == (None, [0]), "drawn under version 0, and too old for step 2"
    assert queue.start(2, 9) == 3


def test_a_straggler_that_can_only_go_stale_holds_nobody_up() -> None:
    queue = GroupQueue(groups_per_step=1, max_staleness=1, window=2)
    assert [queue.start(0, 9) for _ in range(2)] == [0, 1]
    queue.finish(1, 0)
    assert queue.take(0) == ([1], [])
    assert queue.start(1, 9) == 2
    queue.finish(2, 1)
    assert queue.take(1) == (None, []), "group 0 may still be consumed, and 2 lies beyond its window"
    assert queue.oldest_open(1) == 0 and queue.oldest_open(2) == 3
    assert queue.take(2) == ([2], [])
    queue.finish(0, 0)
    assert queue.take(3) == (None, [0])
