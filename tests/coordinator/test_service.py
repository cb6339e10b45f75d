"""The coordinator on the fabric: who is admitted, who may ask for what, and what becomes of those who may not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from served import Served
from shoal.errors import JoinRefused
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.join import invitation_of
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.node import RevokeReply, RevokeRequest, TicketReply, TicketRequest
from shoal.protocol.work import BatchReply, BatchRequest, LeaseReply, LeaseRequest, StepReply, StepReport


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served(tmp_path) as served:
        yield served


async def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.02)


async def owner_asks(run: Served, verb: str, message: Record) -> bytes:
    """As `shoal ticket` and `shoal revoke` do: with the coordinator's own key."""
    ticket = run.fabric.ticket(run.run.name, b"no secret of it")
    async with await Fabric.connect(run.root, ticket) as fabric:
        return await fabric.request(f"run/{verb}", encode(message), 5.0, to=run.root.public_key)


async def test_each_request_needs_its_role(run: Served) -> None:
    worker, learner, observer = await run.join(), await run.join("learner"), await run.join("observer")
    assert (await worker.link.lease(0, 8)).lease is not None
    assert (await learner.link.call("batch", BatchRequest(version=0), BatchReply, 20.0)).episodes is None
    report = StepReport(version=1, metrics={"reward": 1.0})
    asked: list[tuple[str, Record, type[Record]]] = [
        ("batch", BatchRequest(version=0), BatchReply),
        ("step", report, StepReply),
    ]
    for part in (worker, observer):
        for verb, message, kind in asked:
            with pytest.raises(JoinRefused, match="may not act as learner"):
                await part.link.call(verb, message, kind)
    for part in (learner, observer):
        with pytest.raises(JoinRefused, match="may not act as worker"):
            await part.link.lease(0, 8)
    assert run.control.version == 0
    assert [e.data["role"] for e in run.events("node.joined")] == ["worker", "learner", "observer"]


async def test_nobody_but_the_owner_makes_tickets_or_revokes(run: Served) -> None:
    worker, learner = await run.join(), await run.join("learner")
    stranger = await run.connect(Identity.generate())
    requests = {
        "ticket": TicketRequest(roles=("worker",), uses=1, life_s=60.0),
        "revoke": RevokeRequest(nodes=(worker.link.node_id,)),
    }
    for fabric in (worker.member.fabric, learner.member.fabric, stranger):
        for verb, message in requests.items():
            with pytest.raises(RemoteError) as caught:
                await fabric.request(f"run/{verb}", encode(message), 5.0, to=run.root.public_key)
            assert caught.value.kind == "stranger"
    await run.lease(worker)


async def test_the_owners_tickets_admit(run: Served) -> None:
    asked = TicketRequest(roles=("observer",), uses=1, life_s=60.0)
    reply = decode(await owner_asks(run, "ticket", asked), TicketReply)
    ticket = run.fabric.ticket(run.run.name, reply.secret)
    await run.join("observer", ticket=ticket)
    with pytest.raises(JoinRefused, match="as often as it may"):
        await run.join("observer", ticket=ticket)
    with pytest.raises(JoinRefused, match="--role"):
        await run.join("worker", ticket=ticket)
    revoked = await owner_asks(run, "revoke", RevokeRequest(invitations=(invitation_of(reply.secret),)))
    assert decode(revoked, RevokeReply).num_invitations == 1
    with pytest.raises(JoinRefused, match="taken back"):
        await run.join("observer", ticket=ticket)


async def test_a_revoked_node_loses_its_leases_at_once_and_is_told(run: Served) -> None:
    ticket = run.ticket(uses=2)
    ann, bob = await run.join(ticket=ticket, name="ann"), await run.join(ticket=ticket, name="bob")
    lease = await run.lease(ann)
    await eventually(lambda: len(bob.member.nodes()) == 3)
    reply = decode(await owner_asks(run, "revoke", RevokeRequest(nodes=("ann",))), RevokeReply)
    assert reply.nodes == (ann.link.node_id,) and reply.open_invitations == 0
    assert run.control.book.ended[lease.id] == "void"
    assert [e.data["reason"] for e in run.events("lease.void")] == ["revoked"]
    for ask in (ann.link.lease(0, 8), ann.link.heartbeat(0, {lease.id: 9}, 1.0)):
        with pytest.raises(JoinRefused, match="taken back"):
            await ask
    with pytest.raises(JoinRefused, match="taken back"):
        await run.join(node=ann.member.fabric.identity, ticket=ticket)
    await eventually(lambda: ann.link.node_id not in {node.id for node in bob.member.nodes()})
    assert [node.name for node in run.coordinator.workers()] == ["bob"]
    await run.lease(bob)
    await run.restart()
    with pytest.raises(JoinRefused, match="taken back"):
        await ann.link.lease(0, 8)
    await run.lease(bob)


async def test_a_grant_is_renewed_before_it_ends_and_costs_no_lease(tmp_path: Path) -> None:
    async with Served(tmp_path, grant_life_s=6.0, rollout__lease_timeout_s=120.0) as run:
        ann = await run.join()
        lease = await run.lease(ann)
        key = ann.member.fabric.identity.public_key
        ended = ann.member.grants.until(key, frozenset({"worker"}), time.time())
        async with asyncio.timeout(60):
            while time.time() <= ended:
                await ann.link.heartbeat(0, {lease.id: 1}, 1.0)
                await asyncio.sleep(0.25)
        await ann.link.heartbeat(0, {lease.id: 2}, 1.0)
        assert run.events("node.renewed") and len(run.events("node.joined")) == 1
        assert "restarted" not in {e.data["reason"] for e in run.events("lease.void")}
        assert ann.member.grants.until(key, frozenset({"worker"}), time.time()) > ended


async def test_a_grant_that_ends_without_its_ticket_ends_the_node(tmp_path: Path) -> None:
    async with Served(tmp_path, grant_life_s=2.0) as run:
        ticket = run.ticket()
        ann = await run.join(ticket=ticket)
        await run.lease(ann)
        assert run.admission.withdraw(invitation_of(ticket.secret)) is not None

        async def beat() -> None:
            async with asyncio.timeout(20):
                while True:
                    await ann.link.heartbeat(0, {}, 0.0)
                    await asyncio.sleep(0.1)

        with pytest.raises(JoinRefused, match="ask for a fresh ticket"):
            await beat()


async def test_refusals_fill_no_disk(run: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.coordinator.door._refusals, "burst", 3.0)
    monkeypatch.setattr(run.coordinator.door._refusals, "rate_per_s", 1e-6)
    stranger = await run.connect(Identity.generate())
    from shoal.rollout.link import join

    bad = run.fabric.ticket(run.run.name, b"x" * 16)
    for _ in range(12):
        with pytest.raises(JoinRefused, match="not one of this run's"):
            await join(stranger, bad, "worker", "eve")
    assert len(run.events("node.refused")) == 3 and run.coordinator.door.num_refused == 12


async def test_a_node_that_joined_asks_again_after_a_restart(run: Served) -> None:
    ann = await run.join()
    await run.lease(ann)
    await run.restart()
    message = LeaseRequest(node_id=ann.link.node_id, version=0, free_slots=8)
    assert (await ann.link.call("lease", message, LeaseReply)).lease is not None
    assert len(run.events("node.joined")) == 2


async def test_the_owner_names_who_is_not_there(run: Served) -> None:
    with pytest.raises(RemoteError, match="knows no node nobody"):
        await owner_asks(run, "revoke", RevokeRequest(nodes=("nobody",)))
