"""Nodes that are not there, so many of them that a node finds none of those that are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import zenoh
from swarm_nodes import ROOT, RUN, SECRET, grant, identity, join

from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, node_id_of
from shoal.swarm.gossip import Gossip
from shoal.swarm.pace import Pace

CROWD = 1000
"""Whoever picks one node of these and the two real ones, by chance and eight times, meets a real one in 1 of 60."""

EXCHANGES = 8

QUICK = Pace(sync_s=0.05, deadline_s=60.0)
"""A real node that answers late, because the machine is busy, has answered."""


@pytest.fixture
async def crowd() -> AsyncIterator[tuple[AsyncExitStack, Fabric]]:
    """A listener with a hostile client, which declares a crowd: presence takes a connection and nothing else."""
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(await Fabric.listen(ROOT))
        eve = await stack.enter_async_context(await Fabric.connect(identity("eve"), listener.ticket(RUN, SECRET)))
        (link,) = eve._core.links
        prefix, session = eve._core.namespace, link.session

        def declare() -> list[zenoh.LivelinessToken]:
            names = (node_id_of(f"nobody {number}".encode()) for number in range(CROWD))
            return [session.liveliness().declare_token(f"{prefix}alive/{name}/{session.info.zid()}") for name in names]

        stack.push_async_callback(_undeclare, await eve._core.blocking(declare))
        yield stack, listener


async def _undeclare(tokens: list[zenoh.LivelinessToken]) -> None:
    for token in tokens:
        token.undeclare()


def trusts(gossip: Gossip, node: Identity) -> bool:
    return gossip.roster.grants.is_granted(node.public_key, time.time())


def tried(gossip: Gossip) -> int:
    return gossip.counters["sync"] + gossip.counters["sync_failed"]


async def test_a_crowd_of_nodes_that_are_not_there(crowd: tuple[AsyncExitStack, Fabric]) -> None:
    """The root throws a node out, and what it publishes of that is lost: notes are all that tells the victim."""
    stack, listener = crowd
    root = await join(stack, ROOT, listener, pace=QUICK)
    await join(stack, identity("honest"), listener, pace=QUICK)
    victim = await join(stack, identity("victim"), listener, pace=QUICK)
    mallory, now = identity("mallory"), time.time()
    for gossip in (root, victim):
        assert gossip.roster.grants.merge_grant(grant(mallory, now=now), now) == "new"
    async with asyncio.timeout(60):
        while len(victim.present) < CROWD + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    root.roster.grants.revoke(ROOT, now, subjects=[mallory.public_key])
    until = tried(victim) + EXCHANGES
    while tried(victim) < until and trusts(victim, mallory):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert not trusts(victim, mallory), "among nodes that are not there it goes on trusting who was thrown out"
