"""The roster: one view for all, whatever is lost, repeated, reordered or forged."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_nodes import NOW, ROOT, RUN, SEALING, TTL_S, book, grant, identity, signed

from shoal.fabric.identity import Identity
from shoal.protocol.roster import MAX_TTL_S, Bundle, Evidence, NodeRecord, SignedRecord
from shoal.swarm.grants import CLOCK_WINDOW_S, GrantBook, issue
from shoal.swarm.roster import ARRIVAL_GRACE_S, RECORD_BURST, WINDOW, Roster
from shoal.swarm.signing import sign, verified

NODES = [identity(f"node {n}") for n in range(6)]
NODE, OTHER = NODES[0], NODES[1]


def roster(*granted: Identity, **settings: object) -> Roster:
    return Roster(RUN, book(*(granted or NODES)), **settings)  # type: ignore[arg-type]


def records_of(view: Roster, now: float = NOW) -> dict[bytes, int]:
    return {node.record.public_key: node.record.sequence for node in view.nodes(now, absent=True)}


# What a single record meets.


def test_newest_wins_and_replays_change_nothing() -> None:
    view = roster()
    first, second = signed(NODE, sequence=1), signed(NODE, sequence=2, region="eu")
    assert [view.merge(r, NOW) for r in (first, second, first, second)] == ["new", "new", "older", "known"]
    assert records_of(view) == {NODE.public_key: 2}
    assert view.newest_sequence(NODE.public_key) == 2 and view.newest_sequence(OTHER.public_key) == 0


def test_forged_and_foreign_records() -> None:
    view = roster()
    real = signed(NODE)
    assert view.merge(SignedRecord(real.body, OTHER.public_key, real.signature), NOW) == "forged"
    assert view.merge(SignedRecord(real.body + b"x", NODE.public_key, real.signature), NOW) == "forged"
    # Another node's words under one's own, valid signature.
    assert view.merge(sign(OTHER, verified(real, NodeRecord)), NOW) == "forged"
    assert view.merge(signed(NODE, run="another run"), NOW) == "run"
    body = b"\x81\xa3run\xa1x"
    assert (
        view.merge(SignedRecord(body, NODE.public_key, NODE.sign(b"shoal node record 1:" + body)), NOW) == "malformed"
    )
    assert view.merge(signed(identity("stranger")), NOW) == "ungranted"
    assert records_of(view) == {} and view.counters["forged"] == 3


def test_clocks() -> None:
    assert roster().merge(signed(NODE, issued_at=NOW + CLOCK_WINDOW_S + 1), NOW) == "clock"
    assert roster().merge(signed(NODE, issued_at=NOW - CLOCK_WINDOW_S - TTL_S - 1), NOW) == "expired"
    for skew_s in (-CLOCK_WINDOW_S, 0.0, CLOCK_WINDOW_S):
        view = roster()
        assert view.merge(signed(NODE, issued_at=NOW + skew_s), NOW) == "new"
        # A clock that is off within the window neither shortens nor lengthens a record's life.
        assert len(view.nodes(NOW + TTL_S - 1, absent=True)) == 1
        assert view.nodes(NOW + TTL_S + 1, absent=True) == []


def test_stale_copies_do_not_go_round() -> None:
    ours, late = roster(), roster()
    ours.merge(signed(NODE), NOW)
    bundle = ours.missing(late.digest(NOW), NOW + TTL_S - 1, 10)
    assert len(bundle.records) == 1
    late.merge(bundle.records[0], NOW + TTL_S - 1)
    later = NOW + TTL_S + 1
    assert ours.missing(roster().digest(later), later, 10) == Bundle()
    # However it is handed on, nobody believes it longer than the window and its time to live.
    chain, now = late, later
    for _ in range(100):
        copies = chain.missing(roster().digest(now), now, 10).records
        chain = roster()
        for copy in copies:
            chain.merge(copy, now)
        now += TTL_S - 1
    assert chain.nodes(now, absent=True) == []


def test_goodbye() -> None:
    view, peer = roster(), roster()
    for one in (view, peer):
        one.merge(signed(NODE, sequence=1), NOW, directly=True)
    view.merge(signed(NODE, sequence=2, ttl_s=0.0), NOW)
    assert view.nodes(NOW, absent=True) == []
    for record in view.missing(peer.digest(NOW), NOW, 10).records:
        peer.merge(record, NOW)
    assert peer.nodes(NOW, absent=True) == [] and peer.summary(NOW) == view.summary(NOW)
    assert view.missing(roster().digest(NOW), NOW, 10).records == ()


def test_equivocation_is_found_kept_spread_and_final() -> None:
    one, other = signed(NODE, region="eu"), signed(NODE, region="us")
    view = roster()
    assert [view.merge(r, NOW) for r in (one, other)] == ["new", "equivocation"]
    later = signed(NODE, sequence=9)
    assert [view.merge(r, NOW) for r in (one, other, later)] == ["equivocated"] * 3
    assert view.nodes(NOW, absent=True) == []

    peer = roster()
    peer.merge(later, NOW)
    (proof,) = view.missing(peer.digest(NOW), NOW, 10).evidence
    assert peer.merge_evidence(proof, NOW) == "equivocation" and peer.merge_evidence(proof, NOW) == "equivocated"
    assert peer.nodes(NOW, absent=True) == [] and peer.merge(later, NOW) == "equivocated"
    assert peer.summary(NOW) == view.summary(NOW)


def test_false_evidence_convicts_nobody() -> None:
    view = roster()
    a, b = signed(NODE, sequence=1), signed(NODE, sequence=2)
    theirs, other = signed(OTHER, sequence=1), signed(NODE, sequence=1, region="eu")
    false = [
        (a, b),  # Two numbers: an ordinary change.
        (a, a),
        (a, theirs),
        (a, SignedRecord(other.body, NODE.public_key, bytes(64))),
        (signed(NODE, run="x"), signed(NODE, run="x", region="eu")),
    ]
    for first, second in false:
        assert view.merge_evidence(Evidence(first, second), NOW) in ("malformed", "forged", "run")
    stranger = identity("stranger")
    true_of_a_stranger = Evidence(signed(stranger), signed(stranger, region="eu"))
    assert view.merge_evidence(true_of_a_stranger, NOW) == "ungranted"
    assert view.merge(a, NOW) == "new" and not view.evidence


def test_fork_that_was_moved_on_from_is_found_by_comparing_windows() -> None:
    here, there = roster(), roster()
    last = signed(NODE, sequence=5)
    for view, fork in ((here, signed(NODE, region="eu")), (there, signed(NODE, region="us"))):
        view.merge(fork, NOW)
        view.merge(last, NOW)
    assert here.summary(NOW) == there.summary(NOW)
    for record in here.missing(there.digest(NOW), NOW, 10).records:
        there.merge(record, NOW)
    assert NODE.public_key in there.evidence


def test_liveliness_hides_and_shows() -> None:
    view = roster()
    view.merge(signed(NODE), NOW)
    view.merge(signed(OTHER), NOW, directly=True)
    ids = {node.id for node in view.nodes(NOW)}
    assert ids == {OTHER.node_id}  # It has just spoken; of the other we only heard.
    assert view.nodes(NOW + ARRIVAL_GRACE_S) == []
    view.note_alive(NODE.node_id, True, NOW)
    view.note_alive(OTHER.node_id, True, NOW)
    assert len(view.nodes(NOW + 10)) == 2
    view.note_alive(OTHER.node_id, False, NOW + 0.5)
    assert {node.id for node in view.nodes(NOW + 0.5)} == {NODE.node_id}
    assert len(view.nodes(NOW + 0.5, absent=True)) == 2
    found = view.node(OTHER.node_id, NOW + 0.5)
    assert found is not None and not found.alive
    view.note_alive(OTHER.node_id, True, NOW + 1)
    assert len(view.nodes(NOW + 1)) == 2


def test_roles_are_offered_and_granted() -> None:
    grants = GrantBook(RUN, ROOT.public_key)
    grants.merge_grant(grant(NODE, ("worker", "stage")), NOW)
    view = Roster(RUN, grants)
    view.merge(signed(NODE, roles=("worker", "learner")), NOW)
    assert [n.roles for n in view.nodes(NOW, "worker", absent=True)] == [{"worker"}]
    assert view.nodes(NOW, "learner", absent=True) == view.nodes(NOW, "stage", absent=True) == []
    grants.revoke(ROOT, NOW, subjects=[NODE.public_key])
    assert view.nodes(NOW, absent=True) == [] and view.missing(Roster(RUN, grants).digest(NOW), NOW, 10).records == ()
    assert view.merge(signed(NODE, sequence=2), NOW) == "ungranted"


def test_records_travel_with_their_grants() -> None:
    here, there = roster(NODE), Roster(RUN, GrantBook(RUN, ROOT.public_key))
    here.merge(signed(NODE), NOW)
    bundle = here.missing(there.digest(NOW), NOW, 10)
    for one in bundle.grants:
        there.grants.merge_grant(one, NOW)
    assert [there.merge(r, NOW) for r in bundle.records] == ["new"]
    # The root's own record needs no grant.
    assert there.merge(signed(ROOT, roles=("learner",)), NOW) == "new"
    assert len(there.nodes(NOW, "learner", absent=True)) == 1


# Floods.


def test_one_node_cannot_change_faster_than_its_rate() -> None:
    view = roster()
    verdicts = [view.merge(signed(NODE, sequence=n), NOW) for n in range(1, 40)]
    assert verdicts.count("new") == RECORD_BURST and verdicts.count("rate") == 39 - RECORD_BURST
    assert view.merge(signed(OTHER), NOW) == "new"
    assert view.merge(signed(NODE, sequence=100), NOW + 1.01) == "new"
    forged = [SignedRecord(signed(NODES[2], sequence=n).body, NODES[2].public_key, bytes(64)) for n in range(1, 40)]
    assert {view.merge(r, NOW) for r in forged} == {"forged"}
    assert view.merge(signed(NODES[2]), NOW) == "new"  # Forgeries use up nothing of the one they name.


def sybils(number: int) -> list[SignedRecord]:
    return [signed(identity(f"sybil {n}")) for n in range(number)]


def test_strangers_never_displace_the_granted() -> None:
    view = roster(*NODES[:3], open_to_all=True, max_nodes=5)
    for record in sybils(20):
        view.merge(record, NOW)
    assert list(view.entries) == [r.signer for r in sybils(5)]  # Nor do they displace each other.
    for node in NODES[:3]:
        assert view.merge(signed(node), NOW) == "new"
    for record in sybils(40):
        view.merge(record, NOW)
    assert len(view.entries) == 5 and {n.public_key for n in NODES[:3]} <= set(records_of(view))
    # Once strangers lapse, others may have their place.
    later = NOW + TTL_S + 1
    assert view.merge(signed(identity("newcomer"), issued_at=later), later) == "new"
    for n in range(10):
        view.merge(signed(identity(f"later {n}"), issued_at=later), later + 2 * n)
    assert {n.public_key for n in NODES[:3]} <= set(view.entries)  # Lapsed, but not for strangers to push out.


def test_strangers_are_refused_where_grants_are_needed() -> None:
    view = roster(NODE)
    assert {view.merge(record, NOW) for record in sybils(20)} == {"ungranted"}
    self_granted = issue(OTHER, RUN, OTHER.public_key, ["worker"], NOW, 100.0)
    assert view.grants.merge_grant(self_granted, NOW) == "issuer"
    assert len(view.entries) == 0


def test_convicted_strangers_do_not_fill_the_table() -> None:
    view = roster(*NODES, open_to_all=True, max_nodes=8)
    for n in range(20):
        stranger = identity(f"sybil {n}")
        for region in ("eu", "us"):
            view.merge(signed(stranger, region=region), NOW)
    assert len(view.entries) + len(view.evidence) <= 8
    assert [view.merge(signed(node), NOW) for node in NODES] == ["new"] * len(NODES)


def test_sweep_forgets_only_what_cannot_come_back() -> None:
    view = roster()
    old = signed(NODE, sequence=1, ttl_s=MAX_TTL_S)
    view.merge(old, NOW)
    view.merge(signed(NODE, sequence=2, ttl_s=0.0), NOW)
    view.sweep(NOW + MAX_TTL_S)
    assert view.merge(old, NOW + MAX_TTL_S) == "older"
    gone = NOW + MAX_TTL_S + CLOCK_WINDOW_S + 1
    view.sweep(gone)
    assert not view.entries and view.merge(old, gone) == "expired"


# All together: a state that is merged.


def state(view: Roster) -> tuple[object, ...]:
    return records_of(view), set(view.evidence), view.summary(NOW), {k: dict(e.window) for k, e in view.entries.items()}


@st.composite
def histories(draw: st.DrawFn) -> list[SignedRecord]:
    """Records of a few nodes, some of them forked; all within one window."""
    made = draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, WINDOW), st.sampled_from(["", "", "eu"])), max_size=12)
    )
    return [signed(NODES[node], sequence=n, region=region) for node, n, region in made]


@given(histories(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_merging_is_commutative_and_idempotent(history: list[SignedRecord], order: random.Random) -> None:
    straight, mixed = roster(), roster()
    for record in history:
        straight.merge(record, NOW)
    again = history + order.choices(history, k=len(history)) if history else []
    order.shuffle(again)
    for record in again:
        mixed.merge(record, NOW)
    assert state(straight) == state(mixed)


def exchange(asker: Roster, answerer: Roster, now: float, limit: int) -> None:
    """Compare notes both ways, as the shell does."""
    for a, b in ((asker, answerer), (answerer, asker)):
        bundle = b.missing(a.digest(now), now, limit)
        for proof in bundle.evidence:
            a.merge_evidence(proof, now)
        for record in bundle.records:
            a.merge(record, now)


@given(histories(), histories(), histories())
@settings(max_examples=25)
def test_who_meets_whom_first_does_not_matter(
    a: list[SignedRecord], b: list[SignedRecord], c: list[SignedRecord]
) -> None:
    def views() -> list[Roster]:
        made = [roster(), roster(), roster()]
        for view, history in zip(made, (a, b, c), strict=True):
            for record in history:
                view.merge(record, NOW)
        return made

    outcomes = []
    for pairs in ([(0, 1), (1, 2), (0, 2)], [(1, 2), (0, 1), (2, 0)], [(0, 2), (1, 2), (0, 1)]):
        made = views()
        for _ in range(3):
            for i, j in pairs:
                exchange(made[i], made[j], NOW, 100)
        assert len({view.summary(NOW) for view in made}) == 1
        outcomes.append((records_of(made[0]), set(made[0].evidence)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


NUM_VIEWS = 4
"""Nodes 0 to 3 each keep a roster; nodes 4 and 5 equivocate and keep none."""

STEPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, NUM_VIEWS - 1)),
    st.tuples(st.just("fork"), st.integers(NUM_VIEWS, 5)),
    st.tuples(st.just("partition"), st.integers(0, 2**NUM_VIEWS - 1)),
    st.tuples(st.just("deliver"), st.integers(1, 6)),
    st.tuples(st.just("exchange"), st.integers(0, NUM_VIEWS**2 - 1)),
)


@given(st.lists(STEPS, max_size=40), st.randoms(use_true_random=False), st.floats(0.0, 0.9), st.integers(1, 3))
@settings(max_examples=80)
def test_views_converge_after_partition_and_heal(
    steps: list[tuple[str, int]], chance: random.Random, loss: float, limit: int
) -> None:
    views = [roster() for _ in range(NUM_VIEWS)]
    group = [0] * NUM_VIEWS
    under_way: list[tuple[int, int, SignedRecord]] = []
    newest = dict.fromkeys(range(6), 0)
    heard: dict[tuple[int, int], set[str]] = defaultdict(set)
    now = NOW

    def receive(view: int, record: SignedRecord) -> None:
        read = verified(record, NodeRecord)
        owner = next(n for n, node in enumerate(NODES) if node.public_key == record.signer)
        if views[view].merge(record, now) in ("new", "older", "known", "equivocation"):
            heard[owner, read.sequence].add(read.region)

    for what, value in steps:
        now += 1.0
        if what == "publish":
            newest[value] += 1
            record = signed(NODES[value], sequence=newest[value], issued_at=now, ttl_s=MAX_TTL_S)
            assert views[value].merge(record, now, directly=True) == "new"
            under_way += [(value, to, record) for to in range(NUM_VIEWS) if to != value]
        elif what == "fork" and newest[value] < WINDOW:
            newest[value] += 1
            for to in range(NUM_VIEWS):
                region = chance.choice(["eu", "us"])
                forked = signed(NODES[value], sequence=newest[value], region=region, issued_at=NOW, ttl_s=MAX_TTL_S)
                under_way.append((to, to, forked))
        elif what == "partition":
            group = [value >> view & 1 for view in range(NUM_VIEWS)]
        elif what == "deliver":
            chance.shuffle(under_way)
            for sender, to, record in under_way[:value]:
                if group[sender] == group[to] and chance.random() >= loss:
                    receive(to, record)
            under_way = under_way[value:] + [m for m in under_way[:value] if chance.random() < 0.2]
        elif what == "exchange":
            a, b = divmod(value, NUM_VIEWS)
            if group[a] == group[b]:
                exchange(views[a], views[b], now, limit)

    # The partition heals; what was under way is lost. Everybody meets everybody, in any order.
    pairs = [(a, b) for a in views for b in views if a is not b]
    for _ in range(6):
        chance.shuffle(pairs)
        for one, other in pairs:
            exchange(one, other, now, limit)
    assert len({view.summary(now) for view in views}) == 1, "views do not converge"

    held = records_of(views[0], now)
    for number in range(NUM_VIEWS):
        assert held.get(NODES[number].public_key, 0) == newest[number], "an honest node's record was lost"
    for (owner, _), regions in heard.items():
        if len(regions) > 1:
            for view in views:
                assert NODES[owner].public_key in view.evidence, "an equivocator is still believed"
    assert all(k.public_key not in view.evidence for view in views for k in NODES[:NUM_VIEWS])


def test_largest_table_fits_one_digest_and_a_bundle_its_limit() -> None:
    view = roster(open_to_all=True)
    for n in range(200):
        view.merge(signed(identity(f"many {n}"), sealing_key=SEALING), NOW)
    assert len(view.digest(NOW).nodes) == 200
    peer = roster(open_to_all=True)
    for _ in range(4):
        bundle = view.missing(peer.digest(NOW), NOW, 64)
        assert len(bundle.records) <= 64
        for record in bundle.records:
            peer.merge(record, NOW)
    assert peer.summary(NOW) == view.summary(NOW)


@pytest.mark.slow
@given(st.lists(STEPS, max_size=200), st.randoms(use_true_random=False), st.floats(0.0, 0.9))
@settings(max_examples=500)
def test_views_converge_after_long_walks(steps: list[tuple[str, int]], chance: random.Random, loss: float) -> None:
    test_views_converge_after_partition_and_heal.hypothesis.inner_test(steps, chance, loss, 2)  # type: ignore[attr-defined]
