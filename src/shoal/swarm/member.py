"""One node's whole part in a run's swarm: it tells of itself, keeps the roster, answers and makes measurements.

    profile ──▶ Member ──▶ roster          coordinator, learner, workers (stages, agents) all start one

Invariants: what a node states as measured was measured by it, over the fabric it uses, or is 0; measurements wait
while this node transfers something that matters (`transferring`), and are rare; services, tasks and the roster end
with the context.

What it costs, measured by `benchmarks/converge.py`: 1.7 kB/s of payload a node, both ways together, in a swarm of 8 (a
record with its grant is 1.0 kB, its envelope 0.3 kB, told every 10 s). From `UNHURRIED_NODES` on, records come less
often in proportion to the number of nodes, so that a node hears at most two a second.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import msgspec

from shoal import PROTOCOL_VERSION, __version__
from shoal.errors import NetworkError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.protocol.roster import Bundle, NodeRecord, SwarmRole
from shoal.swarm.gossip import Gossip, swarm_prefix
from shoal.swarm.grants import GrantBook
from shoal.swarm.measure import measure_delays, measure_rates, serve_probes
from shoal.swarm.pace import DEFAULT_PACE, Pace
from shoal.swarm.roster import Node, Roster

log = logging.getLogger("shoal.swarm")

FIRST_MEASURE_S = 1.0
"""The first measurement begins within this: while the node loads its model and the link is idle."""

MEASURE_EVERY_S = 600.0
"""Links change slowly, and every measurement costs others something."""

MEASURED_PEERS = 8
"""Nodes besides the root to which a node measures the delay: learners first, then some chosen by chance."""

QUIET_STEP_S = 1.0
MAX_QUIET_WAITS = 300
"""A link that is never idle is not measured; its delays are."""


def profile(fabric: Fabric, run: str, roles: tuple[SwarmRole, ...], **facts: Any) -> NodeRecord:
    """What a node says of itself; `Gossip` numbers and times it."""
    return NodeRecord(
        run=run,
        public_key=fabric.identity.public_key,
        sealing_key=fabric.sealing_key,
        sequence=1,
        issued_at=0.0,
        ttl_s=0.0,
        protocol_version=PROTOCOL_VERSION,
        software=__version__,
        roles=roles,
        **facts,
    )


class Member:
    """`async with Member(fabric, run, root, profile) as member: member.nodes("worker")`."""

    def __init__(
        self,
        fabric: Fabric,
        run: str,
        root: bytes,
        profile: NodeRecord | None,
        *,
        grants: GrantBook | None = None,
        measures_delays: bool = False,
        measures_rates: bool = False,
        pace: Pace = DEFAULT_PACE,
    ) -> None:
        """
        Args:
            root: public key that signs grants and revocations: the coordinator's.
            profile: what to say of oneself (`profile`), or `None` to listen only.
            grants: where this node's own grant lies already.
            measures_delays: to the root and a few others, at the start and then rarely.
            measures_rates: of the link to the root, too; of no use between processes of one machine.
        """
        self.fabric = fabric
        self.grants = grants if grants is not None else GrantBook(run, root)
        self.roster = Roster(run, self.grants)
        self.gossip = Gossip(fabric, self.roster, profile, pace=pace)
        self._profile = profile
        self._prefix = swarm_prefix(run)
        self._measures_delays = measures_delays
        self._measures_rates = measures_rates
        self._num_transfers = 0
        self._stack = AsyncExitStack()
        self._measuring: asyncio.Task[None] | None = None

    # The view

    def nodes(self, role: SwarmRole | None = None, *, absent: bool = False) -> list[Node]:
        """Who is here, as this node sees it; see `Roster.nodes`."""
        return self.roster.nodes(time.time(), role, absent=absent)

    def node(self, node_id: str) -> Node | None:
        """One of them, by id."""
        return self.roster.node(node_id, time.time())

    def is_granted(self, key: bytes) -> bool:
        """Whether `key` may act in any role now: for services that every node of the run may ask."""
        return self.grants.is_granted(key, time.time())

    def require(self, key: bytes, role: SwarmRole) -> None:
        """Raise `JoinRefused` unless `key` may act in `role` now."""
        self.grants.require(key, role, time.time())

    async def changed(self, since: int) -> int:
        """Wait until the roster's revision is another than `since`; returns it."""
        return await self.gossip.changed(since)

    # What is told

    def update(self, *, soon: bool = False, **facts: Any) -> None:
        """Change what this node says of itself (fields of `NodeRecord`), with the next regular record or `soon`."""
        if self._profile is None:
            return
        changed = msgspec.structs.replace(self._profile, **facts)
        if changed != self._profile:
            self._profile = changed
            self.gossip.announce(changed, soon=soon)

    async def spread(self, bundle: Bundle) -> None:
        """Take in and tell everybody: the root's grants and revocations."""
        await self.gossip.spread(bundle)

    async def introduce(self, key: bytes) -> None:
        """Make sure that the node with this key has heard of this one's grant, which may still be under way to it."""
        await self.gossip.sync_with(node_id_of(key), deep=True)

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """While inside, this node transfers what matters, and no measurement begins."""
        self._num_transfers += 1
        try:
            yield
        finally:
            self._num_transfers -= 1

    # Life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await serve_probes(self.fabric, self._prefix, self.is_granted)
            await stack.enter_async_context(self.gossip)
            self._stack = stack.pop_all()
        if self._measures_delays or self._measures_rates:
            self._measuring = asyncio.create_task(self._measure_regularly())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)
        await self._stack.aclose()

    async def _measure_regularly(self) -> None:
        await asyncio.sleep(random.uniform(0.0, FIRST_MEASURE_S))
        while True:
            if self._measures_delays:
                found = await measure_delays(self.fabric, self._prefix, self._peers())
                self.update(soon=True, delays=found)
            if self._measures_rates and await self._is_quiet():
                await self._measure_rates()
            await asyncio.sleep(MEASURE_EVERY_S * random.uniform(0.8, 1.2))

    async def _measure_rates(self) -> None:
        root = self.grants.root
        try:
            rates = await measure_rates(self.fabric, self._prefix, root, node_id_of(root))
        except NetworkError as error:
            self.gossip.counters["rates_not_measured"] += 1
            log.info("the link to the coordinator was not measured: %s", error)
            return
        self.update(
            soon=True, uplink_bytes_per_s=rates.uplink_bytes_per_s, downlink_bytes_per_s=rates.downlink_bytes_per_s
        )

    async def _is_quiet(self) -> bool:
        """Wait until this node transfers nothing that matters; whether that came about."""
        for _ in range(MAX_QUIET_WAITS):
            if not self._num_transfers:
                return True
            await asyncio.sleep(QUIET_STEP_S)
        return False

    def _peers(self) -> list[tuple[str, bytes]]:
        """The root, and those to whom the delay is worth knowing."""
        own, root = self.fabric.identity.public_key, self.grants.root
        others = [node for node in self.nodes() if node.record.public_key not in (own, root)]
        random.shuffle(others)
        others.sort(key=lambda node: "learner" not in node.roles)
        chosen = [(node.id, node.record.public_key) for node in others[:MEASURED_PEERS]]
        return ([] if own == root else [(node_id_of(root), root)]) + chosen
