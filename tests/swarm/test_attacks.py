"""What hostile nodes try on a real coordinator over a real fabric; after each an honest worker still gets work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from served import Served
from shoal.broadcast.chain import build_manifest, open_manifest, sign_manifest
from shoal.broadcast.publisher import announcement_topic, announcements
from shoal.errors import JoinRefused, NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.join import make_join_request
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.node import JoinReply
from shoal.protocol.roster import Bundle, NodeRecord, SignedRecord
from shoal.protocol.work import (
    BatchReply,
    BatchRequest,
    Heartbeat,
    StepReply,
    StepReport,
    Submission,
    SubmissionReply,
)
from shoal.rollout.link import Part, join
from shoal.swarm.gossip import STRANGER_BURST, STRANGER_RATE_PER_S, swarm_prefix
from shoal.swarm.grants import issue
from shoal.swarm.member import profile
from shoal.swarm.signing import sign

Eventually = Callable[[Callable[[], object]], Awaitable[None]]

SYBILS = 1500
"""Keys in a flood: more than every burst together, and few enough for a test."""


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served(tmp_path) as served:
        yield served


@pytest.fixture
async def honest(run: Served) -> AsyncIterator[Part]:
    """A worker that is there before the attack; after it, it still gets work and the coordinator still answers."""
    part = await run.join(name="honest")
    yield part
    await run.lease(part)
    async with asyncio.timeout(30):  # A coordinator that was restarted has yet to hear of it.
        while part.link.node_id not in {node.id for node in run.coordinator.member.nodes("worker")}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert run.control.failure is None


async def publish(run: Served, fabric: Fabric, bundle: Bundle) -> None:
    """On the topic where the run's nodes tell of themselves."""
    await fabric.publish(f"{swarm_prefix(run.run.name)}/news", encode(bundle), wait=True)


def record(run: Served, fabric: Fabric, **fields: object) -> NodeRecord:
    """What a node would say of itself."""
    facts = {"sequence": int(time.time() * 1000), "issued_at": time.time(), "ttl_s": 30.0} | fields
    return replace(profile(fabric, run.run.name, ("worker",)), **facts)


async def test_records_and_grants_that_are_forged(run: Served, honest: Part, eventually: Eventually) -> None:
    eve = await run.join(name="eve")
    fabric, roster = eve.member.fabric, run.coordinator.member.roster
    victim = honest.member.fabric.identity.public_key
    mine = sign(fabric.identity, record(run, fabric, name="the honest one", public_key=victim))
    other = Identity.generate()
    self_made = issue(fabric.identity, run.run.name, other.public_key, ("learner",), time.time(), 60.0)
    await publish(run, fabric, Bundle(records=(mine,), grants=(self_made,)))
    posing = replace(mine, signer=victim)
    # Not one's own: refused unread on the topic, and by its signature where notes are compared.
    await publish(run, fabric, Bundle(records=(posing,)))
    await eventually(lambda: roster.counters["forged"] and run.coordinator.member.gossip.counters["grant.issuer"])
    await eventually(lambda: run.coordinator.member.gossip.counters["malformed"])
    assert roster.merge(posing, time.time()) == "forged"
    assert not run.admission.grants.is_granted(other.public_key, time.time())
    seen = run.coordinator.member.node(honest.link.node_id)
    assert seen is not None and seen.record.name == "honest"


async def test_a_ticket_stolen_after_its_one_use(run: Served, honest: Part) -> None:
    ticket = run.ticket()
    await run.join(ticket=ticket)
    with pytest.raises(JoinRefused, match="as often as it may"):
        await run.join(ticket=ticket, name="thief")


async def test_a_ticket_that_has_expired(run: Served, honest: Part) -> None:
    ticket = run.ticket(life_s=0.05)
    await asyncio.sleep(0.1)
    with pytest.raises(JoinRefused, match="expired"):
        await run.join(ticket=ticket)


async def test_a_worker_that_plays_the_learner(run: Served, honest: Part) -> None:
    """It asks for a batch, reports a step, announces and serves a snapshot of its own making."""
    eve = await run.join(name="eve")
    fabric, learner = eve.member.fabric, await run.join("learner")
    own = sign_manifest(build_manifest(run.run.name, "policy", 9, b"", {}), fabric.identity)
    report = StepReport(version=9, metrics={"reward": 1.0}, manifest=encode(own))
    with pytest.raises(JoinRefused, match="learner"):
        await eve.link.call("batch", BatchRequest(version=0), BatchReply)
    with pytest.raises(JoinRefused, match="learner"):
        await eve.link.call("step", report, StepReply)
    assert run.control.version == 0 and run.control.published == 0

    key, node_id = run.learner.public_key, run.learner.node_id
    heard: list[int] = []

    async def listen() -> None:
        async with announcements(honest.member.fabric, key, "policy") as versions:
            async for version in versions:
                heard.append(version)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.2)
    await fabric.publish(announcement_topic(node_id, "policy"), b"9", wait=True)

    async def serve(_: Request) -> bytes:
        return encode(own)

    await fabric.serve(f"node/{node_id}/manifest/*/*", serve)
    with pytest.raises(NetworkError):
        await honest.member.fabric.request(f"node/{node_id}/manifest/policy/9", b"", 2.0, to=key)
    assert honest.member.fabric.counters["answer_ignored.signature"] >= 1
    with pytest.raises(RecordError, match="another key"):
        open_manifest(own, key, run.run.name)
    await learner.member.fabric.publish(announcement_topic(node_id, "policy"), b"1", wait=True)
    async with asyncio.timeout(10):
        while not heard:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    listening.cancel()
    assert heard == [1]


async def test_an_observer_that_wants_work(run: Served, honest: Part) -> None:
    observer = await run.join("observer")
    with pytest.raises(JoinRefused, match="may not act as worker"):
        await observer.link.lease(0, 8)
    empty = Submission(lease="x", node_id=observer.link.node_id, episodes=())
    with pytest.raises(JoinRefused, match="may not act as worker"):
        await observer.link.submit(empty)
    with pytest.raises(JoinRefused, match="do not admit|does not admit"):
        await run.join("worker", node=observer.member.fabric.identity, ticket=run.ticket("observer"))


async def test_a_flood_of_keys_that_join_and_gossip(run: Served, honest: Part, eventually: Eventually) -> None:
    """Each with a key of its own, without a ticket: what they bring is neither kept nor noted for long."""
    eve = await run.connect(Identity.generate())
    coordinator, gossip = run.coordinator, run.coordinator.member.gossip
    bad, served = run.fabric.ticket(run.run.name, b"x" * 16), 0
    keys = [Identity.generate() for _ in range(SYBILS)]
    joining, started = set(keys[::5]), time.monotonic()
    events_before = (run.run.path / "events.jsonl").stat().st_size

    async def work() -> None:
        nonlocal served
        while True:
            await honest.link.heartbeat(0, {}, 1.0)
            served += 1
            await asyncio.sleep(0.01)

    honestly = asyncio.create_task(work())
    for key in keys:
        eve._core.identity = eve.identity = key
        await publish(run, eve, Bundle(records=(sign(key, record(run, eve)),)))
        if key in joining:
            request = make_join_request(key, bad, "worker", "sybil " * 40, now=time.time())
            body = encode(request)
            reply = decode(await eve.request("run/join", body, 20.0, to=run.root.public_key), JoinReply)
            assert not reply.accepted and reply.code == "secret"
    assert not honestly.done(), honestly
    honestly.cancel()
    await asyncio.gather(honestly, return_exceptions=True)
    assert served > 3
    assert len(coordinator.nodes) == 1 and len(coordinator.member.roster.entries) <= 2
    assert len(gossip._rates) <= gossip._rates.capacity and len(run.admission._nonces) <= 2
    await asyncio.sleep(0.2)
    most = STRANGER_BURST + STRANGER_RATE_PER_S * (time.monotonic() - started)
    assert coordinator.member.roster.counters["ungranted"] <= most + 1
    assert (run.run.path / "events.jsonl").stat().st_size - events_before < 64 * 1024


async def test_a_flood_by_a_node_that_has_a_grant(run: Served, honest: Part, eventually: Eventually) -> None:
    identity, ticket = Identity.generate(), run.ticket()
    fabric, gossip = await run.connect(identity), run.coordinator.member.gossip
    await join(fabric, ticket, "worker", "eve")
    start = int(time.time() * 1000)
    for number in range(600):
        signed = sign(identity, record(run, fabric, sequence=start + number))
        await publish(run, fabric, Bundle(records=(signed,)))
    await eventually(lambda: gossip.counters["rate"] > 300)
    assert len(run.coordinator.member.roster.entries[identity.public_key].window) <= 8


async def test_messages_that_are_sent_again(run: Served, honest: Part, eventually: Eventually) -> None:
    """What others sent, brought again by one who heard it: join, lease, submission, news."""
    eve = await run.connect(Identity.generate())
    ann_identity, ticket = Identity.generate(), run.ticket()
    request = make_join_request(ann_identity, ticket, "worker", "ann", now=time.time())
    ann = await run.connect(ann_identity)
    joined = decode(await ann.request("run/join", encode(request), 5.0, to=run.root.public_key), JoinReply)
    assert joined.accepted
    for fabric, code in ((eve, "signature"), (ann, "replay")):
        data = await fabric.request("run/join", encode(request), 5.0, to=run.root.public_key)
        assert decode(data, JoinReply).code == code

    lease = await run.lease(honest)
    nothing = Submission(lease=lease.id, node_id=honest.link.node_id, episodes=())
    with pytest.raises(RemoteError) as caught:
        await eve.request("run/submit", encode(nothing), 5.0, to=run.root.public_key)
    assert caught.value.kind == "stranger"
    other = await run.join(name="other")
    assert (await other.link.call("submit", nothing, SubmissionReply)).verdicts == {}
    assert lease.id not in run.control.book.ended, "another's submission ends nothing"
    beat = Heartbeat(node_id=honest.link.node_id, version=0, leases={lease.id: 5})
    await other.link.call("heartbeat", beat, type(await honest.link.heartbeat(0, {lease.id: 1}, 0.0)))

    roster = run.coordinator.member.roster
    key = honest.member.fabric.identity.public_key
    await eventually(lambda: key in roster.entries)
    old = roster.entries[key].signed
    honest.member.update(soon=True, region="elsewhere")
    await eventually(lambda: roster.entries[key].record.region == "elsewhere")
    assert roster.merge(old, time.time()) == "older"
    await publish(run, other.member.fabric, Bundle(records=(old,)))
    await asyncio.sleep(0.2)
    assert roster.entries[key].record.region == "elsewhere"


async def test_a_joining_of_long_ago_after_a_restart(run: Served, honest: Part) -> None:
    """A router keeps what it carried; the restarted coordinator has forgotten every nonce."""
    identity, ticket = Identity.generate(), run.ticket()
    ann = await run.connect(identity)
    old = make_join_request(identity, ticket, "worker", "ann", now=time.time() - 5.0)
    await run.restart()
    await join(ann, ticket, "worker", "ann")
    reply = decode(await ann.request("run/join", encode(old), 5.0, to=run.root.public_key), JoinReply)
    assert reply.code == "replay"
    assert not [e for e in run.events("lease.void") if e.data["reason"] == "restarted"]


async def test_a_node_that_says_two_things_at_once(run: Served, honest: Part, eventually: Eventually) -> None:
    eve = await run.join(name="eve")
    fabric, views = eve.member.fabric, [run.coordinator.member, honest.member]
    await eventually(lambda: all(len(view.nodes()) == 3 for view in views))
    number = int(time.time() * 1000) + 60_000
    for name in ("one thing", "another"):
        signed = sign(fabric.identity, record(run, fabric, sequence=number, name=name))
        await publish(run, fabric, Bundle(records=(signed,)))
    key = fabric.identity.public_key
    await eventually(lambda: all(key in view.roster.evidence for view in views))
    assert all(eve.link.node_id not in {node.id for node in view.nodes(absent=True)} for view in views)


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
async def test_clocks_that_are_wrong(run: Served, honest: Part, eventually: Eventually, skew_s: float) -> None:
    eve = await run.join(name="eve")
    fabric, roster = eve.member.fabric, run.coordinator.member.roster
    now = time.time() + skew_s
    request = make_join_request(fabric.identity, run.ticket(), "worker", "eve", now=now)
    reply = decode(await fabric.request("run/join", encode(request), 5.0, to=run.root.public_key), JoinReply)
    assert reply.code == "clock" and "NTP" in reply.reason
    wrong = sign(fabric.identity, record(run, fabric, issued_at=now, sequence=int(time.time() * 1000) + 9999))
    before = roster.entries.get(fabric.identity.public_key)
    assert roster.merge(wrong, time.time()) in ("clock", "expired")
    assert roster.entries.get(fabric.identity.public_key) == before


async def test_a_clock_within_the_window_is_no_attack(run: Served, honest: Part, eventually: Eventually) -> None:
    """Volunteers' clocks drift: minutes are borne, and such a node lives as long as any other."""
    identity = Identity.generate()
    fabric = await run.connect(identity)
    request = make_join_request(identity, run.ticket(), "worker", "late", now=time.time() - 200.0)
    reply = decode(await fabric.request("run/join", encode(request), 5.0, to=run.root.public_key), JoinReply)
    assert reply.accepted
    signed = sign(identity, record(run, fabric, issued_at=time.time() - 200.0, ttl_s=30.0))
    await publish(run, fabric, Bundle(records=(signed,), grants=reply.grants[:1]))
    await eventually(lambda: run.coordinator.member.node(identity.node_id) is not None)


async def test_a_revoked_node_that_goes_on(run: Served, honest: Part, eventually: Eventually) -> None:
    ticket = run.ticket(uses=9)
    eve = await run.join(ticket=ticket, name="eve")
    lease = await run.lease(eve)
    identity = eve.member.fabric.identity
    revoked = run.admission.grants.revoke(run.root, time.time(), subjects=[identity.public_key])
    await run.coordinator.member.spread(Bundle(revocations=revoked))
    nothing = Submission(lease=lease.id, node_id=eve.link.node_id, episodes=())
    for ask in (eve.link.lease(0, 8), eve.link.submit(nothing), eve.link.heartbeat(0, {lease.id: 9}, 1.0)):
        with pytest.raises(JoinRefused, match="taken back"):
            await ask
    with pytest.raises(JoinRefused, match="taken back"):
        await join(eve.member.fabric, ticket, "worker", "eve")
    await eventually(lambda: not honest.member.is_granted(identity.public_key))
    signed: SignedRecord = sign(identity, record(run, eve.member.fabric, sequence=int(time.time() * 1000) + 9999))
    assert run.coordinator.member.roster.merge(signed, time.time()) == "ungranted"
    assert eve.link.node_id not in {node.id for node in honest.member.nodes()}
