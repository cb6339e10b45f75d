"""The ledger: what enters, what convicts, and that copies which exchange pages become one."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.errors import RecordError
from shoal.fabric.identity import Identity
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Task
from shoal.protocol.ledger import Attestation, Contribution, Fork, LedgerEntry, LedgerHeads, LedgerPage
from shoal.protocol.roster import SignedRecord
from shoal.swarm.ledger import Ledger
from shoal.swarm.signing import sign

NODES = [Identity.generate() for _ in range(4)]
KEYS = [node.public_key for node in NODES]


def attested(score: float = 1.0, number: int = 0) -> Attestation:
    task = Task(env="arithmetic", id=f"a{number}", seed=number)
    return Attestation(skill="sums", task=task, answer="4", score=score)


def did(number: int = 0) -> Contribution:
    return Contribution(problem=f"p{number}", step=0, delivery="delivered", tokens=10, seconds=1.0)


def ledger(run: str = "run") -> Ledger:
    return Ledger(run, lambda key: key in KEYS)


def exchange(one: Ledger, other: Ledger, most: int = 256) -> None:
    """Pages both ways until nobody lacks anything, through bytes as on the wire."""
    for _ in range(10_000):
        pages = []
        for giver, taker in ((one, other), (other, one)):
            heads = decode(encode(taker.heads()), LedgerHeads)
            pages.append(decode(encode(giver.page_for(heads, most=most)), LedgerPage))
            taker.take(pages[-1])
        if all(page.complete for page in pages) and one.root == other.root:
            return
    raise AssertionError("two ledgers did not become one")


def test_entries_are_a_chain_and_nobody_speaks_for_itself() -> None:
    mine = ledger()
    first = mine.write(NODES[0], KEYS[1], attested(), 1.0)
    second = mine.write(NODES[0], KEYS[1], did(), 2.0)
    with pytest.raises(RecordError, match="foreign"):
        mine.write(NODES[0], KEYS[0], attested(), 3.0)
    other = ledger()
    assert other.merge(second) == "early" and other.merge(first) == "new" and other.merge(second) == "new"
    assert other.merge(first) == "known" and other.root == mine.root
    assert [entry.sequence for _, entry in other.entries()] == [1, 2] and other.since(KEYS[0], 1)[0].what == did()


def test_what_does_not_enter() -> None:
    mine = ledger()
    entry = LedgerEntry(run="run", sequence=1, before=bytes(16), subject=KEYS[1], issued_at=0.0, what=did())
    good = sign(NODES[0], entry)
    stranger = Identity.generate()
    assert mine.merge(SignedRecord(good.body, KEYS[2], good.signature)) == "forged"
    assert mine.merge(SignedRecord(good.body[:-1], good.signer, good.signature)) == "forged"
    assert mine.merge(sign(stranger, entry)) == "foreign", "nobody admitted it"
    assert mine.merge(sign(NODES[0], replace(entry, run="other"))) == "foreign"
    assert mine.merge(sign(NODES[0], replace(entry, before=b"x" * 16))) == "early"
    assert mine.merge(good) == "new" and mine.signers == [KEYS[0]]
    for bad in (attested(score=1.5), replace(did(), problem="no spaces"), replace(attested(), answer="x" * 5000)):
        with pytest.raises(RecordError):
            sign(NODES[0], replace(entry, what=bad))


def test_who_says_two_things_at_once_counts_no_more() -> None:
    left, right = ledger(), ledger()
    left.write(NODES[0], KEYS[1], attested(1.0), 1.0)
    right.write(NODES[0], KEYS[1], attested(0.0), 1.0)
    honest = left.write(NODES[2], KEYS[1], attested(), 1.0)
    exchange(left, right)
    for one in (left, right):
        assert one.convicted == {KEYS[0]} and one.signers == [KEYS[2]]
        with pytest.raises(RecordError, match="convicted"):
            one.write(NODES[0], KEYS[1], did(), 2.0)
    third = ledger()
    third.write(NODES[0], KEYS[3], did(), 1.0)
    exchange(third, left)
    assert third.convicted == {KEYS[0]}, "the proof is passed on"
    forged = Fork(honest, SignedRecord(honest.body + b"x", honest.signer, honest.signature))
    assert third.merge_fork(forged) == "forged" and third.merge_fork(Fork(honest, honest)) == "forged"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), forks=st.booleans())
def test_copies_that_exchange_pages_become_one(seed: int, forks: bool) -> None:
    draw = Random(seed)
    copies = [ledger() for _ in range(4)]
    for number in range(draw.randint(5, 60)):
        author = draw.randrange(4)
        # A node writes to its own copy; one that forks writes to another's, too, which may lack what it said before.
        place = draw.choice(copies) if forks and author == 3 else copies[author]
        subject = KEYS[(author + draw.randint(1, 3)) % 4]
        try:
            signed = place.write(NODES[author], subject, attested(draw.random(), number), float(number))
        except RecordError:
            assert KEYS[author] in place.convicted
            continue
        for other in draw.sample(copies, draw.randint(0, 3)):
            other.merge(signed)
        if draw.random() < 0.2:
            one, other = draw.sample(copies, 2)
            other.take(one.page_for(other.heads(), most=draw.randint(1, 5)))
    order = [(a, b) for a in range(4) for b in range(a)] * 2
    draw.shuffle(order)
    for a, b in order:
        exchange(copies[a], copies[b], most=draw.randint(1, 20))
    for a, b in [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2), (1, 3)]:
        exchange(copies[a], copies[b])
    assert len({copy.root for copy in copies}) == 1
    assert len({tuple(copy.signers) for copy in copies}) == 1
    if not forks:
        assert not copies[0].convicted
