"""Measurements between real fabrics: of the right order, refused to strangers, bounded."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from swarm_nodes import ROOT, RUN, SECRET, identity

from conftest import Cable
from shoal.errors import NetworkError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.swarm.gossip import swarm_prefix
from shoal.swarm.measure import MAX_PROBE_BYTES, measure_delay, measure_delays, measure_rates, serve_probes

PREFIX = swarm_prefix(RUN)
NODE, STRANGER = identity("node 0"), identity("stranger")


async def test_delay_and_rates(stack: AsyncExitStack, listener: Fabric) -> None:
    node = await stack.enter_async_context(await Fabric.connect(NODE, listener.ticket(RUN, SECRET)))
    await serve_probes(listener, PREFIX, lambda key: key == NODE.public_key)
    delay_s = await measure_delay(node, PREFIX, ROOT.public_key, ROOT.node_id)
    assert 0 < delay_s < 3
    rates = await measure_rates(node, PREFIX, ROOT.public_key, ROOT.node_id)
    assert min(rates) > 0
    nobody = identity("nobody")
    found = await measure_delays(node, PREFIX, [(ROOT.node_id, ROOT.public_key), (nobody.node_id, nobody.public_key)])
    assert set(found) == {ROOT.node_id} and node.counters["probe_failed"] == 1


async def test_limits(stack: AsyncExitStack, listener: Fabric) -> None:
    await serve_probes(listener, PREFIX, lambda key: key == NODE.public_key)
    node = await stack.enter_async_context(await Fabric.connect(NODE, listener.ticket(RUN, SECRET)))
    stranger = await stack.enter_async_context(await Fabric.connect(STRANGER, listener.ticket(RUN, SECRET)))
    give, take = f"{PREFIX}/give/{ROOT.node_id}", f"{PREFIX}/take/{ROOT.node_id}"
    with pytest.raises(RemoteError) as refused:
        await stranger.request(give, (1000).to_bytes(8, "big"), 5.0)
    assert refused.value.kind == "stranger"
    with pytest.raises(NetworkError):
        await measure_rates(stranger, PREFIX, ROOT.public_key, ROOT.node_id)
    with pytest.raises(RemoteError, match="at most"):
        await node.request(give, (MAX_PROBE_BYTES + 1).to_bytes(8, "big"), 5.0)
    with pytest.raises(RemoteError, match="exceeds the limit"):
        await node.request(take, bytes(MAX_PROBE_BYTES + 1), 5.0)


async def test_a_longer_way_takes_longer(stack: AsyncExitStack, listener: Fabric, cable: Cable) -> None:
    await serve_probes(listener, PREFIX)
    ticket = listener.ticket(RUN, SECRET)
    near = await stack.enter_async_context(await Fabric.connect(NODE, ticket))
    await serve_probes(near, PREFIX)
    relayed = await stack.enter_async_context(await Fabric.connect(STRANGER, ticket))
    # Through the listener to another node: two hops, each way through real sockets.
    async with asyncio.timeout(20):
        assert await measure_delay(relayed, PREFIX, NODE.public_key, NODE.node_id) > 0
