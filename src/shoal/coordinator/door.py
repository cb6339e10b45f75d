"""What is asked at a run's door: to be let in, by anybody; for tickets and revocations, by the owner.

    run/join ──▶ Admission ──▶ the table of nodes, JoinReply        run/ticket, run/revoke ──▶ Admission ──▶ everybody

Invariants: a node is in the table only if it was admitted; who joins anew under a known key is that node, restarted,
and has lost what it held, unless it says that it only renews its grant; refusals fill neither memory nor disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.config import Config
from shoal.coordinator.admission import Admission
from shoal.coordinator.control import Control
from shoal.coordinator.nodes import Node
from shoal.coordinator.rundir import RunDir
from shoal.fabric.join import REASONS, read_join_request
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.node import JoinReply, JoinRequest, RefusalCode, RevokeRequest, TicketReply, TicketRequest
from shoal.protocol.roster import Bundle
from shoal.protocol.work import WorkSpec
from shoal.swarm.member import Member
from shoal.swarm.rate import RateLimiter

HEARTBEAT_S = 2.0

BEATS_PER_LEASE = 3
"""Heartbeats that a lease's time holds at least, so that losing one of them costs nothing."""

MAX_NODES = 1024
MAX_REQUEST_BYTES = 64 * 2**10

REFUSALS_NOTED_PER_S, REFUSALS_BURST = 0.2, 50.0
"""Refused join requests that become events; the rest are only counted: whoever floods us fills no disk."""


class Door:
    """One run's door.

    Args:
        nodes: the table of those who joined.
        expel: takes a node's id and the reason why it takes part no longer.
    """

    def __init__(
        self,
        config: Config,
        control: Control,
        run: RunDir,
        admission: Admission,
        nodes: dict[str, Node],
        member: Member,
        expel: Callable[[str, str], None],
    ) -> None:
        self._config = config
        self._control = control
        self._run = run
        self._admission = admission
        self._nodes = nodes
        self._member = member
        self._expel = expel
        self._refusals = RateLimiter(REFUSALS_NOTED_PER_S, REFUSALS_BURST)
        self.num_refused = 0

    async def join(self, request: Request) -> bytes:
        asked = read_join_request(request.body)
        if isinstance(asked, str):
            return self._refuse(asked, request.sender)
        if self._control.ended:
            return self._refuse("ended", request.sender, asked.name)
        num_others = sum(node.alive and node.node_id != request.sender for node in self._nodes.values())
        if num_others >= MAX_NODES:
            return self._refuse("full", request.sender, asked.name)
        code = self._admission.admit(asked, request.sender_key, time.time())
        if code is not None:
            return self._refuse(code, request.sender, asked.name)
        self._note_joined(asked, request.sender)
        spec = WorkSpec(
            model=self._config.model.name,
            dtype=self._config.model.dtype,
            envs={name: {"type": t, "settings": s} for name, (t, s) in self._config.worlds.items()},
            context_tokens=self._config.model.context_tokens,
            heartbeat_s=min(HEARTBEAT_S, self._config.rollout.lease_timeout_s / BEATS_PER_LEASE),
            on_swap=self._config.rollout.on_swap,
            seeded=self._config.trust.check and self._config.trust.seeds,
        )
        reply = JoinReply(
            accepted=True,
            node_id=request.sender,
            learner_key=self._admission.learner_key,
            spec=encode(spec),
            grants=self._admission.grants_for(request.sender_key, time.time()),
            revocations=self._admission.grants.revocations,
        )
        return encode(reply)

    def _note_joined(self, asked: JoinRequest, node_id: str) -> None:
        known = self._nodes.get(node_id)
        if known is not None and asked.renews and known.alive:
            self._run.event("node.renewed", node_id, name=asked.name, role=asked.role)
            return
        if known is not None:
            # The same key again is the same node, restarted: what its former life held is lost.
            self._control.node_left(node_id, "restarted")
            del self._nodes[node_id]  # so that the order is that of joining
        self._nodes[node_id] = Node(
            node_id, asked.public_key, asked.name, asked.role, asked.device, joined_at=time.time()
        )
        self._forget_nodes()
        self._run.event("node.joined", node_id, name=asked.name, role=asked.role)

    def _refuse(self, code: RefusalCode, node_id: str, name: str = "") -> bytes:
        self.num_refused += 1
        if self._refusals.take(b"", time.monotonic()):
            self._run.event("node.refused", node_id, name=name, code=code, refused_so_far=self.num_refused)
        return encode(JoinReply(accepted=False, code=code, reason=REASONS[code]))

    def _forget_nodes(self) -> None:
        """Drop those that left longest ago; one that comes back introduces itself again."""
        gone = [node_id for node_id, node in self._nodes.items() if not node.alive]
        for node_id in gone[: max(0, len(self._nodes) - 2 * MAX_NODES)]:
            del self._nodes[node_id]

    async def ticket(self, request: Request) -> bytes:
        asked = decode(request.body, TicketRequest, max_bytes=MAX_REQUEST_BYTES)
        invite = self._admission.invite(asked.roles, time.time(), life_s=asked.life_s, uses=asked.uses)
        self._run.event("ticket.made", request.sender, roles=asked.roles, uses=asked.uses, life_s=asked.life_s)
        return encode(TicketReply(secret=invite.secret, expires_at=invite.expires_at))

    async def revoke(self, request: Request) -> bytes:
        asked = decode(request.body, RevokeRequest, max_bytes=MAX_REQUEST_BYTES)
        names: dict[str, set[bytes]] = {}
        for node in self._nodes.values():
            names.setdefault(node.name, set()).add(node.public_key)
        reply, revocations = self._admission.revoke(asked, names, time.time())
        for node_id in reply.nodes:
            self._expel(node_id, "revoked")
        self._run.event("grants.revoked", request.sender, nodes=reply.nodes, num_invitations=reply.num_invitations)
        if revocations is not None:
            await self._member.spread(Bundle(revocations=revocations))
        return encode(reply)
