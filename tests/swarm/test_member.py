"""Members of one swarm: what they tell, what they measure, and how soon they miss each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from swarm_nodes import ROOT, RUN, SECRET, grant, identity

from shoal.errors import JoinRefused
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.protocol.roster import Bundle, SwarmRole
from shoal.swarm.grants import GrantBook
from shoal.swarm.member import Member, profile

Eventually = Callable[[Callable[[], object]], Awaitable[None]]


async def enter(
    stack: AsyncExitStack, listener: Fabric, node: Identity, *roles: SwarmRole, measures: bool = False, **facts: object
) -> Member:
    """A member of the run; the root itself, if `node` is that."""
    fabric = listener
    grants = GrantBook(RUN, ROOT.public_key)
    if node is not ROOT:
        fabric = await stack.enter_async_context(await Fabric.connect(node, listener.ticket(RUN, SECRET)))
        now = time.time()
        grants.merge_grant(grant(node, roles, now), now)
    record = profile(fabric, RUN, roles, **facts)
    return await stack.enter_async_context(
        Member(
            fabric,
            RUN,
            ROOT.public_key,
            record,
            grants=grants,
            measures_delays=measures,
            measures_rates=measures,
        )
    )


async def test_members_see_each_other_and_what_each_tells(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    root = await enter(stack, listener, ROOT, name="coordinator")
    ann = await enter(stack, listener, identity("ann"), "worker", name="ann", region="here", price_usd_per_hour=0.5)
    bob = await enter(stack, listener, identity("bob"), "learner", "worker", name="bob")
    members = [root, ann, bob]
    await eventually(lambda: all(len(member.nodes()) == 3 for member in members))
    ids = {name: identity(name).node_id for name in ("ann", "bob")}
    for member in members:
        assert {node.id for node in member.nodes("worker")} == set(ids.values())
        assert [node.id for node in member.nodes("learner")] == [ids["bob"]]
        seen = member.node(ids["ann"])
        assert seen is not None and (seen.record.region, seen.record.price_usd_per_hour) == ("here", 0.5)
        assert member.is_granted(identity("ann").public_key)
        with pytest.raises(JoinRefused, match="may not act as learner"):
            member.require(identity("ann").public_key, "learner")
    ann.update(soon=True, tokens_per_s=123.0)

    def told() -> bool:
        views = [member.node(ids["ann"]) for member in members]
        return all(view is not None and view.record.tokens_per_s == 123.0 for view in views)

    await eventually(told)
    late = await enter(stack, listener, identity("late"), "observer")
    await eventually(lambda: len(late.nodes()) == 4)
    views = {node.record.name for node in late.nodes()}
    assert {"coordinator", "ann", "bob"} <= views


async def test_links_are_measured_and_told(stack: AsyncExitStack, listener: Fabric, eventually: Eventually) -> None:
    root = await enter(stack, listener, ROOT)
    await enter(stack, listener, identity("bob"), "learner")
    ann = await enter(stack, listener, identity("ann"), "worker", measures=True)
    key = identity("ann").node_id

    def told() -> bool:
        node = root.node(key)
        return node is not None and node.record.uplink_bytes_per_s > 0

    await eventually(told)
    node = root.node(key)
    assert node is not None
    assert node.record.downlink_bytes_per_s > 1e5 and node.record.uplink_bytes_per_s > 1e5, "of loopback"
    assert ROOT.node_id in node.record.delays and 0 < node.record.delays[ROOT.node_id] < 5.0
    assert ann.node(key) is not None


async def test_no_measurement_begins_during_a_transfer(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.swarm.member.QUIET_STEP_S", 0.05)
    monkeypatch.setattr("shoal.swarm.member.FIRST_MEASURE_S", 0.05)
    root = await enter(stack, listener, ROOT)
    ann = await enter(stack, listener, identity("ann"), "worker", measures=True)
    key = identity("ann").node_id

    def record() -> object:
        node = root.node(key)
        return node and node.record

    with ann.transferring():
        await eventually(lambda: getattr(record(), "delays", None))
        await asyncio.sleep(0.5)
        assert getattr(record(), "uplink_bytes_per_s", None) == 0
    await eventually(lambda: getattr(record(), "uplink_bytes_per_s", 0) > 0)


async def test_a_revoked_member_is_gone_for_all(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    root = await enter(stack, listener, ROOT)
    ann = await enter(stack, listener, identity("ann"), "worker")
    bob = await enter(stack, listener, identity("bob"), "worker")
    await eventually(lambda: all(len(member.nodes()) == 3 for member in (root, ann, bob)))
    revoked = root.grants.revoke(ROOT, time.time(), subjects=[identity("ann").public_key])
    await root.spread(Bundle(revocations=revoked))
    gone = identity("ann").node_id
    await eventually(lambda: all(gone not in {node.id for node in member.nodes()} for member in (root, bob)))
    await eventually(lambda: not ann.is_granted(identity("ann").public_key))
    late = await enter(stack, listener, identity("late"), "worker")
    await eventually(lambda: len(late.nodes()) == 3)
    assert not late.is_granted(identity("ann").public_key), "who comes later hears of it as well"


async def test_a_node_that_has_not_heard_of_a_grant_is_introduced(
    stack: AsyncExitStack, listener: Fabric, eventually: Eventually
) -> None:
    """Its publication may be lost: what is served to granted nodes alone then opens by comparing notes."""
    await enter(stack, listener, ROOT)
    ann = await enter(stack, listener, identity("ann"), "worker")
    bob = await enter(stack, listener, identity("bob"), "learner")
    await bob.introduce(identity("ann").public_key)
    assert ann.is_granted(identity("bob").public_key) and bob.is_granted(identity("ann").public_key)
