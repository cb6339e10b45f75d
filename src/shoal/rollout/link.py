"""The worker's side of the conversation with a run: join, lease, heartbeat, submit, leave.

Every call is a signed request to the coordinator that the ticket names, with a deadline; refusals come back as typed
errors. Keys are `run/<verb>` (`KEYS`); the coordinator serves the same names.
"""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from shoal.errors import JoinRefused, NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.join import make_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.node import JoinReply, NodeRole
from shoal.protocol.work import (
    Ack,
    Heartbeat,
    HeartbeatReply,
    LeaseReply,
    LeaseRequest,
    Leaving,
    Submission,
    SubmissionReply,
    WorkSpec,
)

DEADLINE_S = 20.0
"""The longest a small request may take, coordinator busy or not."""

SUBMIT_DEADLINE_S = 60.0

MAX_ANSWER_BYTES = 256 * 2**20
"""A batch of episodes is the largest answer there is."""

R = TypeVar("R", bound=Record)


async def join(fabric: Fabric, ticket: Ticket, role: NodeRole, name: str, *, device: str, threads: int) -> JoinReply:
    """Ask to take part.

    Raises:
        JoinRefused: with the coordinator's reason.
        NetworkError: no answer.
    """
    request = make_join_request(fabric.identity, ticket, role, name, now=time.time(), device=device, threads=threads)
    try:
        data = await fabric.request("run/join", encode(request), DEADLINE_S, to=ticket.coordinator_key)
    except RemoteError:
        raise
    except NetworkError as error:
        raise NetworkError(
            f"run '{ticket.run}' does not answer at the ticket's address: {error.problem}",
            "Check that it still runs, or ask for a fresh ticket.",
        ) from error
    reply = decode(data, JoinReply)
    if not reply.accepted:
        raise JoinRefused(f"the run refused this {role}: {reply.reason}")
    return reply


class RunLink:
    """Calls to one run's coordinator."""

    def __init__(
        self, fabric: Fabric, ticket: Ticket, role: NodeRole, name: str, device: str = "cpu", threads: int = 1
    ) -> None:
        self._fabric = fabric
        self._ticket = ticket
        self._introduction = (role, name, device, threads)
        self._joining = asyncio.Lock()
        self._num_joins = 0
        self.node_id = fabric.identity.node_id

    async def call(self, verb: str, message: Record, reply: type[R], deadline_s: float = DEADLINE_S) -> R:
        """One request; raises NetworkError, or the typed refusal."""
        num_joins = self._num_joins
        try:
            return await self._ask(verb, message, reply, deadline_s)
        except RemoteError as error:
            if error.kind != "stranger":
                raise
        # A coordinator that was restarted does not know its nodes any more: introduce ourselves again, but once,
        # because whoever joins is taken for newly started and loses what it holds.
        async with self._joining:
            if self._num_joins == num_joins:
                role, name, device, threads = self._introduction
                await join(self._fabric, self._ticket, role, name, device=device, threads=threads)
                self._num_joins += 1
        return await self._ask(verb, message, reply, deadline_s)

    async def _ask(self, verb: str, message: Record, reply: type[R], deadline_s: float) -> R:
        data = await self._fabric.request(
            f"run/{verb}",
            encode(message),
            deadline_s,
            to=self._ticket.coordinator_key,
            max_reply_bytes=MAX_ANSWER_BYTES,
        )
        return decode(data, reply, max_bytes=MAX_ANSWER_BYTES)

    async def lease(self, version: int, free_slots: int) -> LeaseReply:
        """Ask for a group of rollouts."""
        reply = await self.call(
            "lease", LeaseRequest(node_id=self.node_id, version=max(0, version), free_slots=free_slots), LeaseReply
        )
        if reply.lease is not None:
            reply.lease.check()
        return reply

    async def heartbeat(self, version: int, leases: dict[str, int], tokens_per_s: float) -> HeartbeatReply:
        """Show that this node lives and what progress its leases made."""
        beat = Heartbeat(node_id=self.node_id, version=max(0, version), leases=leases, tokens_per_s=tokens_per_s)
        return await self.call("heartbeat", beat, HeartbeatReply)

    async def submit(self, submission: Submission) -> SubmissionReply:
        """Hand in a lease's episodes; safe to repeat."""
        return await self.call("submit", submission, SubmissionReply, SUBMIT_DEADLINE_S)

    async def leave(self) -> None:
        """Say goodbye; leases end at once."""
        await self.call("leave", Leaving(node_id=self.node_id), Ack, deadline_s=3.0)


def work_spec(reply: JoinReply) -> WorkSpec:
    """The work described in a join reply."""
    if not reply.spec:
        raise RecordError("the coordinator's answer to the join request says nothing about the work.")
    return decode(reply.spec, WorkSpec)
