"""The run's door: what admits, what it grants, what is taken back, and that all of it outlives the process."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal import PROTOCOL_VERSION
from shoal.coordinator.admission import INVITES, REVOCATIONS, Admission
from shoal.coordinator.rundir import RunDir
from shoal.errors import JoinRefused, RunError, StorageError
from shoal.fabric.identity import Identity
from shoal.fabric.join import invitation_of, make_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.node import JoinRequest, RevokeRequest
from shoal.protocol.roster import Grant, SwarmRole
from shoal.swarm.signing import verified

ANN, BOB = Identity.generate(), Identity.generate()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "a run")


def asks(
    node: Identity, run: RunDir, secret: bytes, role: SwarmRole = "worker", now: float | None = None
) -> JoinRequest:
    ticket = Ticket(PROTOCOL_VERSION, run.name, ("tcp/127.0.0.1:7447",), bytes(32), secret)
    return make_join_request(node, ticket, role, "a name", now=time.time() if now is None else now)


def admit(door: Admission, asked: JoinRequest, now: float | None = None) -> str | None:
    return door.admit(asked, asked.public_key, time.time() if now is None else now)


def secret_of(door: Admission, *roles: SwarmRole, uses: int = 1, life_s: float = 60.0) -> bytes:
    return door.invite(roles or ("worker",), time.time(), life_s=life_s, uses=uses).secret


def test_a_ticket_for_one_admits_one_also_over_a_restart(run: RunDir) -> None:
    door = Admission.of(run)
    secret = secret_of(door)
    assert admit(door, asks(ANN, run, secret)) is None
    assert admit(door, asks(BOB, run, secret)) == "used"
    door = Admission.of(run)
    assert admit(door, asks(BOB, run, secret)) == "used"
    assert admit(door, asks(ANN, run, secret)) is None, "who joined may come back"
    for name in (INVITES, REVOCATIONS):
        path = run.path / name
        assert not path.exists() or stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_refusal(run: RunDir) -> None:
    door = Admission.of(run)
    secret, now = secret_of(door, "worker", uses=9), time.time()
    assert admit(door, asks(ANN, run, b"x" * 16)) == "secret"
    assert admit(door, replace(asks(ANN, run, b"x" * 16), invitation=invitation_of(secret))) == "secret"
    assert admit(door, asks(ANN, run, b"")) == "secret", "no secret is no secret's proof"
    assert admit(door, replace(asks(ANN, run, secret), run="another")) == "run"
    assert admit(door, asks(ANN, run, secret, "observer")) == "role"
    assert admit(door, asks(ANN, run, secret, "learner")) == "role"
    assert admit(door, asks(ANN, run, secret, now=now + 3600)) == "clock"
    assert admit(door, asks(ANN, run, secret, now=now + 61), now + 61) == "expired"
    assert door.admit(asks(ANN, run, secret), BOB.public_key, now) == "signature"
    assert not door.grants.is_granted(ANN.public_key, now) and not door.invites.keys()


def test_only_the_learners_key_is_granted_learner(run: RunDir) -> None:
    door = Admission.of(run)
    learner = Identity.load_or_create(run.path / "identity" / "learner")
    secret = secret_of(door, "learner", "worker", uses=9)
    assert admit(door, asks(ANN, run, secret, "learner")) == "role"
    assert admit(door, asks(learner, run, secret, "learner")) is None
    now = time.time()
    assert door.grants.roles(learner.public_key, now) == {"learner"}
    both = Admission.of(run, colocated=True)
    assert admit(both, asks(learner, run, secret, "learner")) is None
    assert both.grants.roles(learner.public_key, now) == {"learner", "worker"}
    with pytest.raises(RunError, match="learner"):
        door.revoke(RevokeRequest(nodes=(learner.node_id,)), {}, now)


def test_a_nodes_answer_carries_its_grant_and_the_learners(run: RunDir) -> None:
    door = Admission.of(run)
    secret = secret_of(door)
    assert admit(door, asks(ANN, run, secret)) is None
    own, learners = (verified(signed, Grant) for signed in door.grants_for(ANN.public_key, time.time()))
    assert (own.subject, own.roles, own.issuer) == (ANN.public_key, ("worker",), door.root.public_key)
    assert (learners.subject, learners.roles) == (door.learner_key, ("learner",))
    again = [verified(signed, Grant) for signed in door.grants_for(ANN.public_key, time.time())]
    assert again == [own, learners], "a grant that is good for long is not issued again"


def test_grants_end_and_are_renewed_while_the_ticket_holds(run: RunDir) -> None:
    door = Admission(run, Identity.generate(), bytes(32), grant_life_s=100.0)
    secret, now = secret_of(door), time.time()
    assert admit(door, asks(ANN, run, secret, now=now), now) is None
    assert door.grants.roles(ANN.public_key, now + 99) == {"worker"}
    assert door.grants.roles(ANN.public_key, now + 101) == frozenset()
    assert admit(door, asks(ANN, run, secret, now=now + 99), now + 99) is None, "after the ticket's own end, too"
    assert door.grants.roles(ANN.public_key, now + 101) == {"worker"}
    assert door.withdraw(invitation_of(secret)) is not None
    assert admit(door, asks(ANN, run, secret, now=now + 150), now + 150) == "secret"


def test_what_is_revoked_stays_so_over_a_restart(run: RunDir) -> None:
    door = Admission.of(run)
    secret, now = secret_of(door, uses=9), time.time()
    assert admit(door, asks(ANN, run, secret)) is None and admit(door, asks(BOB, run, secret)) is None
    reply, signed = door.revoke(RevokeRequest(nodes=("ann",)), {"ann": {ANN.public_key}}, now)
    assert reply.nodes == (ANN.node_id,) and reply.open_invitations == 1 and signed is not None
    for each in (door, Admission.of(run)):
        assert admit(each, asks(ANN, run, secret)) == "revoked"
        with pytest.raises(JoinRefused, match="taken back"):
            each.grants.require(ANN.public_key, "worker", now)
        assert admit(each, asks(BOB, run, secret)) is None
    assert stat.S_IMODE((run.path / REVOCATIONS).stat().st_mode) == 0o600


def test_a_ticket_that_is_taken_back_names_whom_it_let_in(run: RunDir) -> None:
    door = Admission.of(run)
    secret, now = secret_of(door, uses=9), time.time()
    assert admit(door, asks(ANN, run, secret)) is None
    reply, signed = door.revoke(RevokeRequest(invitations=(invitation_of(secret),)), {}, now)
    assert reply.num_invitations == 1 and reply.admitted == (ANN.node_id,) and signed is None
    assert admit(Admission.of(run), asks(BOB, run, secret)) == "secret"
    assert door.grants.roles(ANN.public_key, now) == {"worker"}
    with pytest.raises(RunError, match="no invitation"):
        door.revoke(RevokeRequest(invitations=(invitation_of(secret),)), {}, now)


def test_nothing_is_changed_by_a_revocation_that_names_a_stranger(run: RunDir) -> None:
    door = Admission.of(run)
    secret = secret_of(door)
    assert admit(door, asks(ANN, run, secret)) is None
    with pytest.raises(RunError, match="knows no node nobody"):
        door.revoke(RevokeRequest(nodes=(ANN.node_id, "nobody")), {}, time.time())
    assert door.grants.is_granted(ANN.public_key, time.time()) and not (run.path / REVOCATIONS).exists()


def test_a_node_that_calls_itself_as_another_is_not_taken_for_it(run: RunDir) -> None:
    door = Admission.of(run)
    secret = secret_of(door, uses=2)
    assert admit(door, asks(ANN, run, secret)) is None and admit(door, asks(BOB, run, secret)) is None
    names = {name: {ANN.public_key, BOB.public_key} for name in ("ann", BOB.node_id)}
    with pytest.raises(RunError, match="several nodes call themselves ann"):
        door.revoke(RevokeRequest(nodes=("ann",)), names, time.time())
    assert not (run.path / REVOCATIONS).exists()
    reply, _ = door.revoke(RevokeRequest(nodes=(BOB.node_id,)), names, time.time())
    assert reply.nodes == (BOB.node_id,), "an id stays one, whoever takes it for a name"


def test_an_older_request_played_again_does_nothing(run: RunDir) -> None:
    door = Admission.of(run)
    secret, now = secret_of(door), time.time()
    first, second = asks(ANN, run, secret, now=now), asks(ANN, run, secret, now=now + 1)
    assert admit(door, first) is None and admit(door, first) == "replay"
    restarted = Admission.of(run)  # which has forgotten the nonces
    assert admit(restarted, second) is None
    assert admit(restarted, first) == "replay"


def test_a_disk_that_takes_nothing_admits_nobody(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    door = Admission.of(run)
    secret = secret_of(door)

    def full(*_: object) -> None:
        raise StorageError("the disk is full.")

    monkeypatch.setattr("shoal.coordinator.admission.write_private", full)
    with pytest.raises(StorageError):
        admit(door, asks(ANN, run, secret))
    assert not door.grants.is_granted(ANN.public_key, time.time())


@pytest.mark.parametrize("name", [INVITES, REVOCATIONS])
def test_damaged_files_are_named(run: RunDir, name: str) -> None:
    path = run.path / name
    path.write_bytes(b"{}")
    path.chmod(0o600)
    with pytest.raises(StorageError, match=name):
        Admission.of(run)
    path.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        Admission.of(run)
