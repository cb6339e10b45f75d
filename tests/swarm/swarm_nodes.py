"""Nodes to test the swarm with: identities made once, records, grants."""

from __future__ import annotations

import hashlib
import time
from contextlib import AsyncExitStack

import msgspec

from shoal import PROTOCOL_VERSION, __version__
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.sealing import SealingKey
from shoal.protocol.roster import NodeRecord, SignedRecord, SwarmRole
from shoal.swarm.gossip import Gossip
from shoal.swarm.grants import ALL_ROLES, GrantBook, issue
from shoal.swarm.pace import DEFAULT_PACE, Pace
from shoal.swarm.roster import Roster
from shoal.swarm.signing import sign

RUN = "a run"
NOW = 1_800_000_000.0
TTL_S = 30.0
SECRET = b"0123456789abcdef"

SEALING = SealingKey.generate().public_key


def identity(name: str) -> Identity:
    """The identity with this name, the same each time."""
    return Identity(hashlib.sha256(name.encode()).digest())


ROOT = identity("root")


def profile(node: Identity, **fields: object) -> NodeRecord:
    """What a node says of itself, before it is numbered and timed."""
    record = NodeRecord(
        run=RUN,
        public_key=node.public_key,
        sealing_key=SEALING,
        sequence=1,
        issued_at=NOW,
        ttl_s=TTL_S,
        protocol_version=PROTOCOL_VERSION,
        software=__version__,
        roles=("worker",),
    )
    return msgspec.structs.replace(record, **fields)


def signed(node: Identity, **fields: object) -> SignedRecord:
    """A signed node record."""
    return sign(node, profile(node, **fields))


def grant(
    node: Identity, roles: tuple[SwarmRole, ...] = ("worker",), now: float = NOW, life_s: float = 3600.0
) -> SignedRecord:
    """A grant by the root."""
    return issue(ROOT, RUN, node.public_key, roles, now, life_s)


def book(*granted: Identity, now: float = NOW) -> GrantBook:
    """A book in which each of these may do everything."""
    grants = GrantBook(RUN, ROOT.public_key)
    for node in granted:
        assert grants.merge_grant(grant(node, tuple(ALL_ROLES), now), now) == "new"
    return grants


async def join(
    stack: AsyncExitStack,
    node: Identity,
    listener: Fabric,
    *,
    port: int = 0,
    pace: Pace = DEFAULT_PACE,
    grants: GrantBook | None = None,
    granted: bool = True,
    speak: bool = True,
    **fields: object,
) -> Gossip:
    """A node that takes part in the run's swarm, connected to `listener` (through `port` of a relay, if given)."""
    now = time.time()
    grants = grants or GrantBook(RUN, ROOT.public_key)
    if granted and node is not ROOT:
        grants.merge_grant(grant(node, tuple(ALL_ROLES), now), now)
    if node is ROOT:
        fabric = listener
    else:
        ticket = listener.ticket(RUN, SECRET)
        if port:
            ticket = msgspec.structs.replace(ticket, endpoints=(f"tcp/127.0.0.1:{port}",))
        fabric = await stack.enter_async_context(await Fabric.connect(node, ticket))
    says = profile(node, **fields) if speak else None
    return await stack.enter_async_context(Gossip(fabric, Roster(RUN, grants), says, pace=pace))


def ids(gossip: Gossip) -> set[str]:
    """Who is here, as one node sees it."""
    return {node.id for node in gossip.roster.nodes(time.time())}
