"""The roster over real fabrics: everybody comes to know everybody, and nothing that should not be believed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from swarm_nodes import ROOT, RUN, SECRET, book, grant, identity, ids, join, profile, signed

from conftest import Cable
from shoal.errors import NetworkError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.roster import Bundle, Evidence, SignedRecord, SyncReply, SyncRequest
from shoal.swarm.exchange import sync_key
from shoal.swarm.gossip import Gossip, swarm_prefix
from shoal.swarm.grants import GrantBook
from shoal.swarm.pace import Pace
from shoal.swarm.roster import Roster

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
NODES = [identity(f"node {n}") for n in range(6)]
PREFIX = swarm_prefix(RUN)
NEWS = f"{PREFIX}/news"

ONLY_WHEN_CHANGED = Pace(refresh_s=1000.0, ttl_s=600.0, sync_s=1000.0)
"""Nothing happens by the clock: what arrives was told, or asked for by hand."""


def regions(gossip: Gossip) -> dict[str, str]:
    return {node.id: node.record.region for node in gossip.roster.nodes(time.time())}


async def swarm(stack: AsyncExitStack, listener: Fabric, number: int, **settings: object) -> list[Gossip]:
    """The root and some nodes."""
    made = [await join(stack, ROOT, listener)]
    for node in NODES[: number - 1]:
        made.append(await join(stack, node, listener, **settings))  # type: ignore[arg-type]
    return made


async def attacker(stack: AsyncExitStack, listener: Fabric, who: Identity) -> Fabric:
    """A fabric without a gossip, for saying what no honest node says."""
    return await stack.enter_async_context(await Fabric.connect(who, listener.ticket(RUN, SECRET)))


async def push(fabric: Fabric, to: Identity, bundle: Bundle) -> SyncReply:
    """Hand records to one node, as comparing notes does."""
    body = encode(SyncRequest(summary=bytes(16), bundle=bundle))
    reply = await fabric.request(sync_key(PREFIX, to.node_id), body, 5.0, to=to.public_key)
    return decode(reply, SyncReply)


async def test_everybody_knows_everybody_and_so_does_who_comes_late(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually, record_property: Callable[[str, object], None]
) -> None:
    made = await swarm(stack, listener, 5)
    everybody = {g.fabric.identity.node_id for g in made}
    started = time.monotonic()
    await eventually(lambda: all(ids(g) == everybody for g in made))
    record_property("converge_s", time.monotonic() - started)
    # Its own record does not reach the others again; all it knows it asked for.
    late = await join(stack, NODES[5], listener)
    started = time.monotonic()
    await eventually(lambda: ids(late) == everybody | {NODES[5].node_id})
    record_property("late_joiner_s", time.monotonic() - started)
    await eventually(lambda: all(ids(g) == ids(late) for g in made))
    assert [n.id for n in late.roster.nodes(time.time(), "worker")] == sorted(ids(late))


async def test_change_and_goodbye_are_told(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    made = await swarm(stack, listener, 3, pace=ONLY_WHEN_CHANGED)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))
    revision = made[0].roster.revision
    made[1].announce(profile(NODES[0], region="eu"))
    assert await asyncio.wait_for(made[0].changed(revision), 20.0) > revision
    await eventually(lambda: all(regions(g)[NODES[0].node_id] == "eu" for g in made))
    # A leaver says so itself, before anyone could miss it.
    async with AsyncExitStack() as brief:
        await join(brief, NODES[3], listener)
        await eventually(lambda: len(ids(made[0])) == 4)
    await eventually(lambda: made[0].roster.entries[NODES[3].public_key].record.ttl_s == 0)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))


async def test_who_listens_only_sees_all_and_is_not_seen(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    made = await swarm(stack, listener, 3)
    quiet = await join(stack, NODES[4], listener, speak=False, granted=False)
    await eventually(lambda: len(ids(quiet)) == 3)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))
    await asyncio.sleep(0.5)
    assert all(NODES[4].node_id not in ids(g) for g in made)


async def test_partition_and_heal(
    stack: AsyncExitStack, listener: Fabric, cable: Cable, eventually: Eventually,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    made = await swarm(stack, listener, 3)
    far = [await join(stack, node, listener, port=cable.port) for node in NODES[2:5]]
    everybody = made + far
    await eventually(lambda: all(len(ids(g)) == 6 for g in everybody))
    await cable.cut()
    await eventually(lambda: all(len(ids(g)) == 3 for g in made) and all(len(ids(g)) == 1 for g in far))
    for number, gossip in enumerate(everybody):
        gossip.announce(profile(gossip.fabric.identity, region=f"place {number}"))
    await asyncio.sleep(1.5)
    await cable.mend()
    started = time.monotonic()
    wanted = {g.fabric.identity.node_id: f"place {n}" for n, g in enumerate(everybody)}
    await eventually(lambda: all(regions(g) == wanted for g in everybody))
    record_property("heal_s", time.monotonic() - started)


async def test_lost_publications_are_made_up_for(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    quick = Pace(sync_s=0.2)
    made = await swarm(stack, listener, 4, pace=quick)
    await eventually(lambda: all(len(ids(g)) == 4 for g in made))
    # A record that was never published, known to one node alone.
    now = time.time()
    made[1].roster.grants.merge_grant(grant(NODES[5], now=now), now)
    assert made[1].roster.merge(signed(NODES[5], issued_at=now), now) == "new"
    await eventually(lambda: all(g.roster.node(NODES[5].node_id, now) for g in made))


# What must not be believed.


async def test_stranger_is_not_admitted(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    made = await swarm(stack, listener, 3)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))
    stranger = await join(stack, identity("stranger"), listener, granted=False)
    await eventually(lambda: made[1].roster.counters["ungranted"] > 0)
    assert all(len(ids(g)) == 3 for g in made) and len(ids(stranger)) <= 3
    now = time.time()
    await made[0].spread(Bundle(grants=(grant(identity("stranger"), now=now),)))
    stranger.announce(profile(identity("stranger"), region="now granted"))
    await eventually(lambda: all(len(ids(g)) == 4 for g in made))


async def test_revoked_grant_is_refused_everywhere(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually, record_property: Callable[[str, object], None]
) -> None:
    made = await swarm(stack, listener, 4)
    await eventually(lambda: all(len(ids(g)) == 4 for g in made))
    key = NODES[1].public_key
    assert all(g.roster.grants.authorise(key, "worker", time.time()) is None for g in made)

    async def work(request: Request) -> bytes:
        made[1].roster.grants.require(request.sender_key, "worker", time.time())
        return b"done"

    await made[1].fabric.serve("work", work)
    ask = made[2].fabric.request
    assert await ask("work", b"", 5.0) == b"done"
    started = time.monotonic()
    now = time.time()
    await made[0].spread(Bundle(revocations=made[0].roster.grants.revoke(ROOT, now, subjects=[key])))
    others = [g for g in made if g.fabric.identity != NODES[1]]
    await eventually(lambda: all(g.roster.grants.authorise(key, "worker", time.time()) for g in others))
    record_property("revoked_s", time.monotonic() - started)
    with pytest.raises(RemoteError, match="taken back"):
        await ask("work", b"", 5.0)
    assert all(NODES[1].node_id not in ids(g) for g in others)
    # Who joins later learns of it from anyone.
    late = await join(stack, NODES[5], listener)
    await eventually(lambda: late.roster.grants.authorise(key, "worker", time.time()) is not None)
    assert NODES[1].node_id not in ids(late)


async def test_equivocator_is_refused_by_all(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    made = await swarm(stack, listener, 4, pace=Pace(sync_s=0.3))
    await eventually(lambda: all(len(ids(g)) == 4 for g in made))
    liar = identity("liar")
    fabric = await attacker(stack, listener, liar)
    now = time.time()
    theirs = (grant(liar, now=now),)
    # One thing to one node, another to the next; each believes it for now.
    for to, region in ((NODES[0], "eu"), (NODES[1], "us")):
        await push(fabric, to, Bundle(records=(signed(liar, issued_at=now, region=region),), grants=theirs))
    await eventually(lambda: all(liar.public_key in g.roster.evidence for g in made))
    await fabric.publish(NEWS, encode(Bundle(records=(signed(liar, issued_at=now, sequence=2),), grants=theirs)))
    late = await join(stack, NODES[5], listener)
    await eventually(lambda: liar.public_key in late.roster.evidence)
    assert all(g.roster.node(liar.node_id, time.time()) is None for g in (*made, late))


async def test_forged_and_replayed_records(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    made = await swarm(stack, listener, 3, pace=ONLY_WHEN_CHANGED)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))
    victim, target = NODES[0], made[2]
    real = target.roster.entries[victim.public_key].signed
    made[1].announce(profile(victim, region="newer"))
    await eventually(lambda: regions(target)[victim.node_id] == "newer")
    fabric = await attacker(stack, listener, NODES[4])
    now = time.time()
    mine = grant(NODES[4], now=now)
    forged = SignedRecord(
        signed(victim, sequence=2**62, issued_at=now, region="forged").body, victim.public_key, bytes(64)
    )
    await push(fabric, NODES[1], Bundle(records=(real, forged), grants=(mine,)))
    false = Evidence(real, SignedRecord(forged.body, victim.public_key, bytes(64)))
    await push(fabric, NODES[1], Bundle(evidence=(false,)))
    assert target.roster.counters["older"] >= 1 and target.roster.counters["forged"] == 2
    # On the topic nobody speaks for another, not even truly.
    await fabric.publish(NEWS, encode(Bundle(records=(real,))))
    await fabric.publish(NEWS, b"\xc1 nonsense")
    await eventually(lambda: target.counters["malformed"] == 2)
    with pytest.raises(RemoteError, match="should be a SyncRequest"):
        await fabric.request(sync_key(PREFIX, NODES[1].node_id), b"\xc1", 5.0)
    assert regions(target) == {ROOT.node_id: "", NODES[1].node_id: "", victim.node_id: "newer"}


async def test_flood_is_cut_and_the_others_are_heard(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    made = await swarm(stack, listener, 3)
    await eventually(lambda: all(len(ids(g)) == 3 for g in made))
    granted, stranger = await attacker(stack, listener, NODES[4]), await attacker(stack, listener, identity("stranger"))
    now = time.time()
    grants = (grant(NODES[4], now=now),)
    for sequence in range(1, 300):
        one = signed(NODES[4], sequence=sequence, issued_at=now)
        await granted.publish(NEWS, encode(Bundle(records=(one,), grants=grants)), wait=True)
        await stranger.publish(NEWS, encode(Bundle(records=(signed(identity("stranger"), issued_at=now),))), wait=True)
    made[1].announce(profile(NODES[0], region="heard"))
    await eventually(lambda: all(regions(g).get(NODES[0].node_id) == "heard" for g in made))
    assert made[2].roster.counters["new"] < 60
    assert made[2].counters["rate"] > 100
    # Comparing notes is rationed as well, and says so.
    pushes = await asyncio.gather(*(push(granted, NODES[1], Bundle()) for _ in range(60)), return_exceptions=True)
    refusals = [str(p) for p in pushes if isinstance(p, RemoteError)]
    assert refusals and all("too often" in r or "too many" in r for r in refusals)


async def test_strangers_share_one_ration() -> None:
    fabric_less = Roster(RUN, book(NODES[0]))
    clock = [1000.0]
    async with await Fabric.listen(Identity.generate()) as fabric:
        gossip = Gossip(fabric, fabric_less, None, clock=lambda: clock[0])
        passed = sum(gossip._may_speak(bytes([n % 256, n // 256]) * 16) for n in range(1000))
        assert passed == 200
        now = time.time()
        fabric_less.grants.merge_grant(grant(NODES[1], now=now), now)
        clock[0] = now
        assert all(gossip._may_speak(NODES[1].public_key) for _ in range(1000))


@pytest.mark.parametrize(("skew_s", "believed"), [(200.0, True), (-200.0, True), (1000.0, False), (-1000.0, False)])
async def test_clocks(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually, skew_s: float, believed: bool
) -> None:
    root = await join(stack, ROOT, listener)
    fabric = await attacker(stack, listener, NODES[0])
    grants = GrantBook(RUN, ROOT.public_key)
    grants.merge_grant(grant(NODES[0], now=time.time()), time.time())
    roster = Roster(RUN, grants)
    await stack.enter_async_context(Gossip(fabric, roster, profile(NODES[0]), clock=lambda: time.time() + skew_s))
    now = time.time()
    await root.spread(Bundle(grants=(grant(NODES[0], now=now),)))
    if believed:
        await eventually(lambda: len(ids(root)) == 2)
    else:
        await eventually(lambda: root.roster.counters["clock"] + root.roster.counters["expired"] > 0)
        assert len(ids(root)) == 1


async def test_restarted_node_goes_on_from_its_last_number(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    made = await swarm(stack, listener, 3)
    fabric = await attacker(stack, listener, NODES[4])
    # Its former life had a clock that ran ahead; the others remember.
    now = time.time()
    ahead = signed(NODES[4], sequence=int((now + 250) * 1000), issued_at=now + 250, region="former")
    await fabric.publish(NEWS, encode(Bundle(records=(ahead,), grants=(grant(NODES[4], now=now),))))
    await eventually(lambda: all(g.roster.newest_sequence(NODES[4].public_key) for g in made))
    await fabric.close()
    await join(stack, NODES[4], listener, region="now")
    await eventually(lambda: all(regions(g).get(NODES[4].node_id) == "now" for g in made))
    assert not any(g.roster.evidence for g in made)


async def test_nobody_answers_for_another(stack: AsyncExitStack, listener: Fabric) -> None:
    made = await swarm(stack, listener, 2, pace=ONLY_WHEN_CHANGED)
    fabric = await attacker(stack, listener, NODES[4])

    async def lie(request: Request) -> bytes:
        return encode(SyncReply())

    await fabric.serve(sync_key(PREFIX, NODES[3].node_id), lie)
    assert not await made[1].sync_with(NODES[3].node_id)
    assert not await made[1].sync_with(identity("nobody").node_id)

    async def babble(request: Request) -> bytes:
        return b"\xc1"

    await fabric.serve(sync_key(PREFIX, NODES[4].node_id), babble)
    assert not await made[1].sync_with(NODES[4].node_id)
    assert made[1].counters["sync_failed"] == 2 and made[1].counters["sync_malformed"] == 1
    assert await made[1].sync_with(ROOT.node_id)


async def test_large_table_comes_in_parts(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    made = [await join(stack, ROOT, listener, pace=ONLY_WHEN_CHANGED)]
    now = time.time()
    for n in range(450):
        many = identity(f"many {n}")
        made[0].roster.grants.merge_grant(grant(many, now=now), now)
        made[0].roster.merge(signed(many, issued_at=now, ttl_s=600.0), now)
    late = await join(stack, NODES[0], listener, pace=ONLY_WHEN_CHANGED)
    await eventually(lambda: len(late.roster.entries) == 452)
    assert await late.sync_with(ROOT.node_id)
    assert late.roster.summary(time.time()) == made[0].roster.summary(time.time())


async def test_taken_key_ends_the_gossip_with_its_reason() -> None:
    async with await Fabric.listen(Identity.generate()) as fabric:
        gossip = Gossip(fabric, Roster(RUN, book()), None)
        await fabric.close()
        with pytest.raises((NetworkError, RuntimeError)):
            async with gossip:
                pass


async def test_stranger_brings_little_at_once(stack: AsyncExitStack, listener: Fabric) -> None:
    made = await swarm(stack, listener, 2, pace=ONLY_WHEN_CHANGED)
    stranger = await attacker(stack, listener, identity("stranger"))
    now = time.time()
    many = tuple(signed(identity(f"many {n}"), issued_at=now) for n in range(100))
    await push(stranger, NODES[0], Bundle(records=many))
    assert made[1].roster.counters["ungranted"] == 4
    # Who brings its own grant is a stranger no more.
    grants = (grant(identity("stranger"), now=now), *(grant(identity(f"many {n}"), now=now) for n in range(100)))
    await push(stranger, NODES[0], Bundle(grants=grants[:1]))
    await push(stranger, NODES[0], Bundle(records=many, grants=grants[1:]))
    assert sum(identity(f"many {n}").public_key in made[1].roster.entries for n in range(100)) == 100


@pytest.mark.slow
async def test_sixty_four_nodes_converge_after_heal(
    stack: AsyncExitStack, listener: Fabric, cable: Cable, record_property: Callable[[str, object], None]
) -> None:
    made = [await join(stack, ROOT, listener)]
    for n in range(63):
        made.append(await join(stack, identity(f"light {n}"), listener, port=cable.port if n % 2 else 0))

    async def until(condition: Callable[[], bool]) -> float:
        started = time.monotonic()
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110  Sixty-four nodes, no one event.
                await asyncio.sleep(0.05)
        return time.monotonic() - started

    record_property("join_s", await until(lambda: all(len(ids(g)) == 64 for g in made)))
    await cable.cut()
    await until(lambda: len(ids(made[0])) == 33 and len(ids(made[-2])) == 1)
    for n, gossip in enumerate(made):
        gossip.announce(profile(gossip.fabric.identity, region=f"place {n}"))
    await asyncio.sleep(4.0)
    await cable.mend()
    wanted = {g.fabric.identity.node_id: f"place {n}" for n, g in enumerate(made)}
    record_property("converge_s", await until(lambda: all(regions(g) == wanted for g in made)))
