"""Estimates from attestations: newcomers, honest minorities, liars who praise each other."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.skills import CAP, Tally, tally
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Attestation, Contribution, LedgerEntry

KEYS = [bytes([number]) * 32 for number in range(12)]


def entry(subject: bytes, score: float, skill: str = "sums") -> LedgerEntry:
    what = Attestation(skill=skill, task=Task(env="e", id="t", seed=0), answer="", score=score)
    return LedgerEntry(run="r", sequence=1, before=bytes(16), subject=subject, issued_at=0.0, what=what)


def work(subject: bytes, delivery: str, verified: float | None = None) -> LedgerEntry:
    what = Contribution(problem="p", step=0, delivery=delivery, verified=verified)  # type: ignore[arg-type]
    return LedgerEntry(run="r", sequence=1, before=bytes(16), subject=subject, issued_at=0.0, what=what)


def test_a_newcomer_is_worth_trying_and_a_claim_is_worth_one_trial() -> None:
    found = Tally()
    plain, boast = found.capability(KEYS[0], "sums"), found.capability(KEYS[0], "sums", claim=1.0)
    assert plain.mean == 0.5 and plain.upper > 0.75 and plain.trials == 0
    assert plain.mean < boast.mean <= 2 / 3 + 1e-9
    for _ in range(30):
        found.add(KEYS[1], entry(KEYS[0], 0.0))
    assert found.capability(KEYS[0], "sums", claim=1.0).upper < 0.3 < plain.mean
    assert found.capability(KEYS[0], "prose").mean == 0.5, "of another skill nothing is known"


def test_one_attester_counts_so_many_trials_and_none_for_itself() -> None:
    found = Tally()
    for _ in range(1000):
        found.add(KEYS[1], entry(KEYS[0], 1.0))
        found.add(KEYS[0], entry(KEYS[0], 1.0))
    assert found.capability(KEYS[0], "sums").trials == CAP
    for attester in KEYS[2:5]:
        for _ in range(12):
            found.add(attester, entry(KEYS[0], 0.0))
    assert found.capability(KEYS[0], "sums").mean < 0.25, "three others outweigh a thousand entries of one"


def test_a_step_that_is_delivered_twice_counts_once() -> None:
    found = Tally()

    def delivery(chain: str, step: int, delivered: str = "delivered") -> LedgerEntry:
        what = Contribution(problem="p", chain=chain, step=step, delivery=delivered)  # type: ignore[arg-type]
        return LedgerEntry(run="r", sequence=1, before=bytes(16), subject=KEYS[0], issued_at=0.0, what=what)

    for _ in range(3):
        found.add(KEYS[1], delivery("a", 0))
    assert found.deliveries[KEYS[0]][KEYS[1]] == (1.0, 1.0)
    found.add(KEYS[1], delivery("a", 1))
    found.add(KEYS[1], delivery("b", 0))
    found.add(KEYS[2], delivery("a", 0))
    assert found.deliveries[KEYS[0]] == {KEYS[1]: (3.0, 3.0), KEYS[2]: (1.0, 1.0)}, "another step, chain or signer"
    found.add(KEYS[1], delivery("a", 0, "late"))
    assert found.deliveries[KEYS[0]][KEYS[1]] == (3.0, 4.0), "it did not come the other time"


def test_liars_who_praise_each_other_and_blame_the_rest_are_not_believed() -> None:
    draw = Random(0)
    liars, honest = KEYS[:3], KEYS[3:10]
    found = Tally()
    for _ in range(1500):
        attester, subject = draw.sample(KEYS[:10], 2)
        truth = float(draw.random() < (0.1 if subject in liars else 0.9))
        found.add(attester, entry(subject, (1.0 if subject in liars else 0.0) if attester in liars else truth))
    trust = found.trust()
    assert max(trust[key] for key in liars) < 0.3 < 0.8 < min(trust[key] for key in honest)
    assert max(found.capability(key, "sums").mean for key in liars) < 0.3
    assert min(found.capability(key, "sums").mean for key in honest) > 0.7


def test_standing_falls_with_what_was_not_delivered() -> None:
    found = Tally()
    assert found.standing(KEYS[0]) == 1.0
    for asker in KEYS[1:4]:
        for _ in range(4):
            found.add(asker, work(KEYS[0], "late"))
            found.add(asker, work(KEYS[4], "delivered"))
            found.add(asker, work(KEYS[5], "delivered", verified=0.0))
    assert found.standing(KEYS[0]) == found.standing(KEYS[5]) == 4 / 16 and found.standing(KEYS[4]) == 1.0


@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS[:5]), st.sampled_from(KEYS[:5]), st.floats(0, 1), st.sampled_from("ab")),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_estimates_are_shares_and_the_order_of_entries_does_not_matter(
    said: list[tuple[bytes, bytes, float, str]], draw: Random
) -> None:
    entries = [(signer, entry(subject, score, skill)) for signer, subject, score, skill in said]
    shuffled = draw.sample(entries, len(entries))
    one, other = tally(entries), tally(shuffled)
    for key in KEYS[:5]:
        for skill in "ab":
            a, b = one.capability(key, skill), other.capability(key, skill)
            assert 0 < a.mean <= a.upper <= 1 and abs(a.mean - b.mean) < 1e-9 and abs(a.upper - b.upper) < 1e-9
    assert all(0 <= weight <= 1 for weight in one.trust().values())
