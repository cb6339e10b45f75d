"""Grants: only the root's count, only in their time, and not after they were taken back."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_nodes import NOW, ROOT, RUN, book, grant, identity

from shoal.errors import CapacityError, JoinRefused
from shoal.protocol.roster import MAX_REVOCATIONS, Grant, SignedRecord
from shoal.swarm.grants import ALL_ROLES, CLOCK_WINDOW_S, GrantBook, issue
from shoal.swarm.signing import sign, verified

NODE, OTHER, THIEF = identity("node"), identity("other"), identity("thief")


def code(grants: GrantBook, key: bytes, role: str, now: float = NOW) -> str:
    denial = grants.authorise(key, role, now)  # type: ignore[arg-type]
    return "" if denial is None else denial.code


def test_role_and_time() -> None:
    grants = book()
    assert code(grants, NODE.public_key, "worker") == "ungranted"
    assert grants.merge_grant(grant(NODE, ("worker", "stage"), life_s=100.0), NOW) == "new"
    assert code(grants, NODE.public_key, "worker") == code(grants, NODE.public_key, "stage") == ""
    assert code(grants, NODE.public_key, "learner") == "role"
    assert code(grants, NODE.public_key, "worker", NOW + 100.0) == "expired"
    assert code(grants, NODE.public_key, "worker", NOW - CLOCK_WINDOW_S - 1) == "not_yet"
    assert code(grants, OTHER.public_key, "worker") == "ungranted"
    with pytest.raises(JoinRefused, match="may not act as learner"):
        grants.require(NODE.public_key, "learner", NOW)
    grants.require(NODE.public_key, "worker", NOW)


def test_root_may_do_everything() -> None:
    assert all(code(book(), ROOT.public_key, role) == "" for role in ALL_ROLES)


def test_only_the_root_grants() -> None:
    grants = book()
    assert grants.merge_grant(issue(THIEF, RUN, THIEF.public_key, ["worker"], NOW, 100.0), NOW) == "issuer"
    real = grant(NODE)
    assert grants.merge_grant(msgspec.structs.replace(real, signature=bytes(64)), NOW) == "forged"
    stolen = msgspec.structs.replace(verified(real, Grant), subject=THIEF.public_key)
    theirs = sign(THIEF, stolen)
    assert grants.merge_grant(SignedRecord(theirs.body, ROOT.public_key, theirs.signature), NOW) == "forged"
    assert grants.merge_grant(issue(ROOT, "another run", NODE.public_key, ["worker"], NOW, 100.0), NOW) == "run"
    assert grants.merge_grant(grant(NODE, life_s=10.0), NOW + 10.0) == "expired"
    assert grants.merge_grant(SignedRecord(b"x", ROOT.public_key, ROOT.sign(b"shoal grant 1:x")), NOW) == "malformed"
    assert all(code(grants, key.public_key, "worker") == "ungranted" for key in (NODE, THIEF))


def test_revocation_by_key_and_by_serial() -> None:
    grants = book()
    first, second = grant(NODE), grant(OTHER)
    for one in (first, second):
        grants.merge_grant(one, NOW)
    early = grants.revoke(ROOT, NOW, subjects=[NODE.public_key])
    assert code(grants, NODE.public_key, "worker") == "revoked" and code(grants, OTHER.public_key, "worker") == ""
    late = grants.revoke(ROOT, NOW, serials=[verified(second, Grant).serial])
    assert code(grants, NODE.public_key, "worker") == code(grants, OTHER.public_key, "worker") == "revoked"
    assert grants.merge_revocations(early, NOW) == "older"
    assert grants.merge_grant(grant(NODE), NOW) == "revoked"
    assert code(grants, NODE.public_key, "worker") == "revoked"
    assert grants.merge_grant(grant(OTHER), NOW) == "new"  # By serial: a new grant counts again.
    assert code(grants, OTHER.public_key, "worker") == ""
    assert grants.presentable(NODE.public_key, NOW) is None

    elsewhere = book()
    assert elsewhere.merge_revocations(late, NOW - 2 * CLOCK_WINDOW_S) == "clock"
    assert elsewhere.merge_revocations(late, NOW) == "new"
    assert elsewhere.merge_grant(first, NOW) == "revoked"
    assert code(elsewhere, NODE.public_key, "worker") == "revoked"


def test_only_the_root_revokes() -> None:
    grants = book(NODE)
    pretender = GrantBook(RUN, THIEF.public_key)
    forged = pretender.revoke(THIEF, NOW, subjects=[NODE.public_key])
    assert grants.merge_revocations(forged, NOW) == "issuer"
    assert grants.merge_revocations(SignedRecord(forged.body, ROOT.public_key, forged.signature), NOW) == "forged"
    other_run = GrantBook("another run", ROOT.public_key).revoke(ROOT, NOW, subjects=[NODE.public_key])
    assert grants.merge_revocations(other_run, NOW) == "run"
    assert code(grants, NODE.public_key, "worker") == ""


def test_a_root_that_restarts_goes_on_from_the_list_it_is_given() -> None:
    before = book()
    kept = before.revoke(ROOT, NOW, subjects=[NODE.public_key])
    after = book()
    after.merge_revocations(kept, NOW)
    newest = after.revoke(ROOT, NOW - 100.0, subjects=[OTHER.public_key])  # Its clock was set back, too.
    assert before.merge_revocations(newest, NOW) == "new"
    assert code(before, NODE.public_key, "worker") == code(before, OTHER.public_key, "worker") == "revoked"


def test_bounds() -> None:
    grants = book()
    with pytest.raises(CapacityError):
        grants.revoke(ROOT, NOW, serials=[n.to_bytes(16, "big") for n in range(MAX_REVOCATIONS + 1)])
    full = grants.revoke(ROOT, NOW, subjects=[n.to_bytes(32, "big") for n in range(MAX_REVOCATIONS)])
    assert book().merge_revocations(full, NOW) == "new"
    for n in range(20):
        grants.merge_grant(grant(NODE, life_s=100.0 + n), NOW)
    kept = grants.presentable(NODE.public_key, NOW)
    assert kept is not None and verified(kept, Grant).expires_at == NOW + 119.0
    grants.sweep(NOW + 3600.0)
    assert code(grants, NODE.public_key, "worker", NOW + 3600.0) == "ungranted"


@given(st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(order: random.Random) -> None:
    nodes = [identity(f"node {n}") for n in range(4)]
    issued = [grant(node, roles) for node in nodes for roles in (("worker",), ("stage", "agent"))]
    root = book()
    lists = [root.revoke(ROOT, NOW, subjects=[nodes[0].public_key])]
    lists.append(root.revoke(ROOT, NOW, serials=[verified(issued[2], Grant).serial]))

    def told(things: list[SignedRecord]) -> list[str]:
        grants = book()
        for thing in things:
            (grants.merge_revocations if thing in lists else grants.merge_grant)(thing, NOW)
        return [code(grants, node.public_key, role) for node in nodes for role in sorted(ALL_ROLES)]

    shuffled = [*issued, *lists, *order.choices(issued + lists, k=6)]
    order.shuffle(shuffled)
    assert told(shuffled) == told([*issued, *lists])
