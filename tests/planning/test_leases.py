"""Leases under random histories: nothing is lost, nothing ends twice, whoever comes late changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from shoal.planning import leases
from shoal.planning.leases import LeaseBook

NODES = st.sampled_from(["ann", "bob", "cid"])


class Leases(RuleBasedStateMachine):
    """Workers of any speed, some of which die, stall, submit late, submit twice or for others."""

    granted = Bundle("granted")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook()
        self.now = 0.0
        self.num_granted = 0
        self.rollouts: dict[str, int] = {}
        self.holder: dict[str, str] = {}
        self.end_of: dict[str, str] = {}

    @rule(target=granted, node=NODES, rollouts=st.integers(1, 8), duration=st.floats(0.5, 20))
    def grant(self, node: str, rollouts: int, duration: float) -> str:
        lease = f"lease-{self.num_granted}"
        self.num_granted += 1
        self.book.grant(lease, node, rollouts, duration, self.now)
        self.rollouts[lease], self.holder[lease] = rollouts, node
        return lease

    @rule(seconds=st.floats(0, 15))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(lease=granted, tokens=st.integers(0, 50))
    def progress(self, lease: str, tokens: int) -> None:
        running = lease in self.book.running
        before = self.book.running[lease].deadline if running else 0.0
        had = self.book.running[lease].progress if running else 0
        assert self.book.progress(lease, self.holder[lease], tokens, self.now) == running
        if running:
            assert (self.book.running[lease].deadline > before) <= (tokens > had), "only progress moves a deadline"

    @rule(lease=granted, node=NODES)
    def progress_of_others(self, lease: str, node: str) -> None:
        if node != self.holder[lease]:
            before = dict(self.book.running)
            assert not self.book.progress(lease, node, 10**6, self.now)
            assert self.book.running == before

    @rule(target=ended, lease=consumes(granted), data=st.data())
    def submit(self, lease: str, data: st.DataObject) -> str:
        size = self.rollouts[lease]
        accepted = data.draw(st.integers(0, size))
        rejected = data.draw(st.integers(0, size - accepted))
        done = self.book.finish(
            lease, self.holder[lease], accepted=accepted, rejected=rejected, void=size - accepted - rejected
        )
        assert done == (lease not in self.end_of), "a lease ends exactly once"
        self.end_of.setdefault(lease, "finished")
        return lease

    @rule(lease=granted, node=NODES)
    def submit_of_others(self, lease: str, node: str) -> None:
        if node != self.holder[lease]:
            counts = self.book.counts.copy()
            assert not self.book.finish(lease, node, accepted=self.rollouts[lease], rejected=0, void=0)
            assert self.book.counts == counts

    @rule(lease=ended)
    def submit_again(self, lease: str) -> None:
        counts = self.book.counts.copy()
        assert not self.book.finish(lease, self.holder[lease], accepted=self.rollouts[lease], rejected=0, void=0)
        assert not self.book.progress(lease, self.holder[lease], 10**6, self.now)
        assert self.book.counts == counts and self.book.ended[lease] == self.end_of[lease]

    @rule(target=ended)
    def expire(self) -> object:
        late = self.book.expire(self.now)
        assert all(h.deadline <= self.now for h in late)
        assert all(h.deadline > self.now for h in self.book.running.values())
        return self._ended([h.lease_id for h in late], "expired")

    @rule(target=ended, node=NODES)
    def node_dies(self, node: str) -> object:
        lost = self.book.void_node(node)
        assert all(h.node_id == node for h in lost)
        assert all(h.node_id != node for h in self.book.running.values())
        return self._ended([h.lease_id for h in lost], "void")

    def _ended(self, found: list[str], how: str) -> object:
        for lease in found:
            assert lease not in self.end_of, "a lease ends exactly once"
            self.end_of[lease] = how
        return multiple(*found)

    @invariant()
    def conserved(self) -> None:
        counts = self.book.counts
        assert self.book.is_conserved
        assert counts["leased"] == sum(self.rollouts.values())
        assert self.book.num_running == sum(n for lease, n in self.rollouts.items() if lease not in self.end_of)
        for how, counted in (("expired", counts["expired"]),):
            assert counted == sum(self.rollouts[lease] for lease, end in self.end_of.items() if end == how)


def test_leases_under_random_histories() -> None:
    _run(Leases, examples=120)


@pytest.mark.slow
def test_leases_under_many_random_histories() -> None:
    _run(Leases, examples=1500)


def _run(machine: type[RuleBasedStateMachine], *, examples: int) -> None:
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=50, deadline=None)
    case = machine.TestCase()
    case.runTest()


def test_a_lease_is_granted_once() -> None:
    book = LeaseBook()
    book.grant("a", "ann", 2, 5.0, 0.0)
    with pytest.raises(AssertionError):
        book.grant("a", "bob", 2, 5.0, 0.0)
    book.void_node("ann")
    with pytest.raises(AssertionError):
        book.grant("a", "bob", 2, 5.0, 0.0)


def test_a_stuck_worker_loses_its_lease_though_it_says_that_it_lives() -> None:
    book = LeaseBook()
    book.grant("a", "ann", 2, 5.0, 0.0)
    assert book.progress("a", "ann", 7, 4.0)
    for now in (5.0, 6.0, 7.0, 8.0):
        assert book.progress("a", "ann", 7, now) and not book.expire(now)
    assert [h.lease_id for h in book.expire(9.0)] == ["a"]
    assert not book.progress("a", "ann", 8, 9.5)


def test_what_waits_for_its_verdict_keeps_its_time_whatever_its_worker_says() -> None:
    book = LeaseBook()
    book.grant("a", "ann", 2, 5.0, 0.0)
    book.hold("a", 1.0, 900.0)
    assert book.progress("a", "ann", 7, 1.1), "a heartbeat that was under way when it was handed in"
    assert not book.expire(900.0) and [h.lease_id for h in book.expire(901.0)] == ["a"]


def test_only_so_many_ended_leases_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "KEEP_ENDED", 3)
    book = LeaseBook()
    for number in range(5):
        book.grant(str(number), "ann", 1, 5.0, 0.0)
        book.finish(str(number), "ann", accepted=1, rejected=0, void=0)
    assert list(book.ended) == ["2", "3", "4"]
    assert not book.finish("0", "ann", accepted=1, rejected=0, void=0)
    assert book.is_conserved
