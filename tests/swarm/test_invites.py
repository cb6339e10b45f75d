"""Join secrets: as many nodes as they are for, until their end, and a file that only its owner reads."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_nodes import NOW, RUN, identity

from shoal import PROTOCOL_VERSION
from shoal.errors import CapacityError, RecordError, StorageError
from shoal.fabric.join import check_join_request, invitation_of, make_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.node import JoinRequest
from shoal.protocol.roster import MAX_SECRETS
from shoal.swarm.invites import InviteBook
from shoal.swarm.keyfile import read_private, write_private

NODE, OTHER = identity("node").public_key, identity("other").public_key


def code(invites: InviteBook, secret: bytes, key: bytes, role: str = "worker", now: float = NOW) -> str:
    denial = invites.spend(secret, key, role, now)  # type: ignore[arg-type]
    return "" if denial is None else denial.code


def test_single_use() -> None:
    invites = InviteBook(RUN)
    secret = invites.issue(["worker"], NOW, life_s=60.0)
    assert code(invites, secret, NODE, "observer") == "role"
    assert code(invites, secret, NODE) == ""
    assert code(invites, secret, OTHER) == "used"
    assert code(invites, secret, NODE) == ""
    assert code(invites, secret, NODE, now=NOW + 61.0) == ""  # Who joined in time may come back.
    assert invites.is_open(invites.issue(["worker"], NOW, life_s=60.0), NOW) and not invites.is_open(secret, NOW)
    assert invites.keys() == {NODE} and [i.secret for i in invites.used_by(NODE)] == [secret]
    assert invites.withdraw(invitation_of(secret)) and invites.withdraw(invitation_of(secret)) is None
    assert code(invites, secret, NODE) == "secret"


def test_expiry() -> None:
    invites = InviteBook(RUN)
    secret = invites.issue(["worker"], NOW, life_s=60.0, max_uses=5)
    assert code(invites, secret, NODE, now=NOW + 59.9) == ""
    assert code(invites, secret, OTHER, now=NOW + 60.0) == "expired"


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans()), max_size=40),
)
def test_never_more_keys_than_uses_across_restarts(uses: list[int], tries: list[tuple[int, int, bool]]) -> None:
    invites = InviteBook(RUN)
    issued = [invites.issue(["worker"], NOW, life_s=60.0, max_uses=n) for n in uses]
    admitted: defaultdict[bytes, set[bytes]] = defaultdict(set)
    for which, who, restart in tries:
        secret = issued[which % len(issued)]
        key = bytes([who]) * 32
        expected = key in admitted[secret] or len(admitted[secret]) < uses[which % len(issued)]
        assert (code(invites, secret, key) == "") == expected
        if expected:
            admitted[secret].add(key)
        if restart:
            invites = InviteBook.from_json(invites.to_json(), RUN)


def test_bounds_and_sweep() -> None:
    invites = InviteBook(RUN)
    for _ in range(MAX_SECRETS):
        invites.issue(["worker"], NOW, life_s=60.0)
    with pytest.raises(CapacityError):
        invites.issue(["worker"], NOW, life_s=60.0)
    assert invites.issue(["worker"], NOW + 60.0, life_s=60.0)


def test_join_request_names_its_secret() -> None:
    invites = InviteBook(RUN)
    secrets = [invites.issue(["worker"], NOW, life_s=60.0) for _ in range(3)]
    node = identity("node")

    def request(secret: bytes) -> JoinRequest:
        ticket = Ticket(PROTOCOL_VERSION, RUN, ("tcp/127.0.0.1:7447",), NODE, secret)
        return make_join_request(node, ticket, "worker", "me", now=NOW)

    def find(asked: JoinRequest) -> bytes:
        found = invites.find(asked.invitation)
        if found is None:
            return b""
        assert check_join_request(asked, run=RUN, secret=found.secret, now=NOW, seen_nonces=()) is None
        return found.secret

    assert [find(request(secret)) for secret in secrets] == secrets
    assert find(request(b"w" * 16)) == b""


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "invites.json"
    assert read_private(path) is None
    invites = InviteBook(RUN)
    secret = invites.issue(["worker"], NOW, life_s=60.0)
    old_mask = os.umask(0)
    try:
        write_private(path, invites.to_json())
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == ["invites.json"]
    data = read_private(path)
    assert data is not None and code(InviteBook.from_json(data, RUN), secret, NODE) == ""
    with pytest.raises(RecordError, match="another|are of run"):
        InviteBook.from_json(data, "another run")
    with pytest.raises(RecordError):
        InviteBook.from_json(b"{}", RUN)
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        read_private(path)
    with pytest.raises(StorageError):
        write_private(path / "below a file", b"")
