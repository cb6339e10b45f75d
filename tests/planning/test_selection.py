"""Choice of executors and the vote over chains."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.selection import UNKNOWN_MATCH, Ballot, Candidate, rank, vote
from shoal.planning.skills import Tally
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Attestation, LedgerEntry

KEYS = [bytes([number]) * 32 for number in range(4)]


def same(requirement: str, skill: str) -> float:
    return 1.0 if skill in requirement else 0.0


def candidate(number: int, availability: float = 1.0, price: float = 0.0, **claims: float) -> Candidate:
    return Candidate(id=f"n{number}", key=KEYS[number], availability=availability, price=price, claims=claims)


def seen(found: Tally, subject: int, skill: str, score: float, times: int = 10) -> None:
    what = Attestation(skill=skill, task=Task(env="e", id="t", seed=0), answer="", score=score)
    entry = LedgerEntry(run="r", sequence=1, before=bytes(16), subject=KEYS[subject], issued_at=0.0, what=what)
    for _ in range(times):
        found.add(KEYS[3], entry)


def test_who_was_seen_to_do_it_well_gets_it() -> None:
    found = Tally()
    seen(found, 0, "sums", 1.0)
    seen(found, 1, "sums", 0.0)
    seen(found, 1, "prose", 1.0)
    both = [candidate(0), candidate(1, sums=1.0)]
    assert rank(found, both, "sums of numbers", same)[0].candidate.id == "n0"
    assert rank(found, both, "a piece of prose", same)[0].candidate.id == "n1"
    assert {one.match.mean for one in rank(found, both, "chess", same)} == {UNKNOWN_MATCH}


def test_a_newcomer_is_tried_before_one_who_failed_and_the_busy_come_last() -> None:
    found = Tally()
    seen(found, 0, "sums", 0.3)
    order = [one.candidate.id for one in rank(found, [candidate(0), candidate(1)], "sums", same)]
    assert order == ["n1", "n0"]
    assert rank(found, [candidate(0), candidate(1, availability=0.1)], "sums", same)[0].candidate.id == "n0"
    assert [one.candidate.id for one in rank(found, [candidate(0, availability=0.0)], "sums", same)] == []


def test_ties_go_by_price_and_then_by_id() -> None:
    offers = [candidate(2, price=2.0), candidate(1, price=1.0), candidate(0, price=1.0)]
    for _ in range(5):
        Random(0).shuffle(offers)
        assert [one.candidate.id for one in rank(Tally(), offers, "sums", same)] == ["n0", "n1", "n2"]


def test_weights_decide_and_abstaining_chains_do_not_count() -> None:
    ballots = [
        Ballot("a", "7", [0.9, 0.8]),
        Ballot("b", "5", [0.3]),
        Ballot("c", "5", [0.4]),
        Ballot("d", None, [1.0]),
        Ballot("e", None, []),
    ]
    found = vote(ballots)
    assert found.answer == "7" and abs(found.support - 0.72 / 1.42) < 1e-9
    assert vote(ballots, weighted=False).answer == "5"
    assert vote([Ballot("a", None, [])]) == (None, 0.0, {})


def test_ties_of_votes_go_to_more_chains_then_the_heaviest_then_the_first() -> None:
    assert vote([Ballot("a", "x", [0.5]), Ballot("b", "y", [0.25]), Ballot("c", "y", [0.25])]).answer == "y"
    uneven = [Ballot("a", "x", [0.5]), Ballot("b", "x", [0.5]), Ballot("c", "y", [0.75]), Ballot("d", "y", [0.25])]
    assert vote(uneven).answer == "y"
    assert vote([Ballot("a", "y", [0.5]), Ballot("b", "x", [0.5])]).answer == "x"


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.floats(0, 1)), max_size=12), st.randoms())
def test_the_order_of_ballots_does_not_matter(drawn: list[tuple[str | None, float]], draw: Random) -> None:
    ballots = [Ballot(str(number), answer, [weight]) for number, (answer, weight) in enumerate(drawn)]
    assert vote(ballots) == vote(draw.sample(ballots, len(ballots)))
