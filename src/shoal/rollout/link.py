"""A node's side of the conversation with a run: join, lease, heartbeat, submit, leave.

    async with taking_part(fabric, ticket, "worker", name) as part:      joined, and a member of the run's swarm
        part.link.lease(…)

Every call is a signed request to the coordinator that the ticket names, with a deadline; refusals come back as typed
errors. Keys are `run/<verb>`; the coordinator serves the same names. A grant is renewed before it ends by joining
again with the same ticket; where the run admits this node no longer, the call raises `JoinRefused`, which is final.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

from shoal.errors import JoinRefused, NetworkError, RecordError
from shoal.fabric.core import MAX_BODY_BYTES
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.join import make_join_request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.node import JoinReply
from shoal.protocol.roster import SwarmRole
from shoal.protocol.work import (
    Ack,
    Arrived,
    Fetching,
    Heartbeat,
    HeartbeatReply,
    LeaseReply,
    LeaseRequest,
    Leaving,
    Submission,
    SubmissionReply,
    WorkSpec,
)
from shoal.swarm.grants import GrantBook, GrantExpired
from shoal.swarm.member import Member, profile

log = logging.getLogger("shoal.rollout")

DEADLINE_S = 20.0
"""The longest a small request may take, coordinator busy or not."""

SUBMIT_DEADLINE_S = 60.0

BUSY_PATIENCE_S = 60.0
"""How long a node goes on asking to join while the coordinator has too many to answer."""

BUSY_RETRY_S = 0.5

RENEW_AT = 0.75
"""A grant is renewed when this part of its life is over."""

RENEW_RETRY_S = 60.0

MAX_ANSWER_BYTES = MAX_BODY_BYTES
"""A batch of episodes is the largest answer there is."""

R = TypeVar("R", bound=Record)


async def join(
    fabric: Fabric,
    ticket: Ticket,
    role: SwarmRole,
    name: str,
    *,
    device: str = "cpu",
    threads: int = 1,
    renews: bool = False,
) -> JoinReply:
    """Ask to take part.

    Raises:
        JoinRefused: with the coordinator's reason.
        NetworkError: no answer.
    """
    give_up_at = time.monotonic() + BUSY_PATIENCE_S
    while True:
        request = make_join_request(
            fabric.identity, ticket, role, name, now=time.time(), device=device, threads=threads, renews=renews
        )
        try:
            data = await fabric.request("run/join", encode(request), DEADLINE_S, to=ticket.coordinator_key)
            break
        except RemoteError as error:
            if error.kind != "busy" or time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(BUSY_RETRY_S * random.uniform(0.5, 1.5))
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
    """Calls to one run's coordinator.

    Args:
        member: takes in what is granted, and tells the others how fast this node samples.
    """

    def __init__(
        self,
        fabric: Fabric,
        ticket: Ticket,
        role: SwarmRole,
        name: str,
        device: str = "cpu",
        threads: int = 1,
        *,
        member: Member | None = None,
    ) -> None:
        self._fabric = fabric
        self._ticket = ticket
        self._role: SwarmRole = role
        self._introduction: dict[str, Any] = {"name": name, "device": device, "threads": threads}
        self._member = member
        self._joining = asyncio.Lock()
        self._num_joins = 0
        self._renew_at = self._next_renewal()
        self.node_id = fabric.identity.node_id

    async def call(self, verb: str, message: Record, reply: type[R], deadline_s: float = DEADLINE_S) -> R:
        """One request; raises NetworkError, or the typed refusal.

        Raises:
            JoinRefused: this node may not, or no longer, do that in this run.
        """
        await self._renew_in_time()
        num_joins = self._num_joins
        try:
            return await self._ask(verb, message, reply, deadline_s)
        except RemoteError as error:
            if error.kind != "stranger" and error.error_type != GrantExpired.__name__:
                raise
        # A coordinator that was restarted does not know its nodes any more, and grants end: introduce ourselves again.
        async with self._joining:
            if self._num_joins == num_joins:
                await self._join_again()
        return await self._ask(verb, message, reply, deadline_s)

    async def _ask(self, verb: str, message: Record, reply: type[R], deadline_s: float) -> R:
        try:
            data = await self._fabric.request(
                f"run/{verb}",
                encode(message),
                deadline_s,
                to=self._ticket.coordinator_key,
                max_reply_bytes=MAX_ANSWER_BYTES,
            )
        except RemoteError as error:
            if error.error_type == JoinRefused.__name__:
                raise JoinRefused(error.problem, error.remedy) from error
            raise
        return decode(data, reply, max_bytes=MAX_ANSWER_BYTES)

    async def _join_again(self) -> None:
        answer = await join(self._fabric, self._ticket, self._role, **self._introduction, renews=True)
        self._num_joins += 1
        if self._member is not None:
            take_grants(answer, self._member.grants)
            self._renew_at = self._next_renewal()

    async def _renew_in_time(self) -> None:
        """Join again before the grant ends; where that fails, it is tried again, and holds until its end."""
        if time.time() < self._renew_at or self._joining.locked():
            return
        async with self._joining:
            self._renew_at = time.time() + RENEW_RETRY_S
            try:
                await self._join_again()
            except (NetworkError, JoinRefused) as error:
                log.warning("this node's grant is not renewed yet: %s", error)

    def _next_renewal(self) -> float:
        if self._member is None:
            return float("inf")
        now, key = time.time(), self._fabric.identity.public_key
        ends = self._member.grants.until(key, frozenset({self._role}), now)
        return now + RENEW_AT * max(0.0, ends - now)

    async def lease(self, version: int, free_slots: int) -> LeaseReply:
        """Ask for a group of rollouts."""
        reply = await self.call(
            "lease", LeaseRequest(node_id=self.node_id, version=max(0, version), free_slots=free_slots), LeaseReply
        )
        if reply.lease is not None:
            reply.lease.check()
        return reply

    async def heartbeat(
        self,
        version: int,
        leases: dict[str, int],
        tokens_per_s: float,
        *,
        fetching: Fetching | None = None,
        arrived: tuple[Arrived, ...] = (),
    ) -> HeartbeatReply:
        """Show that this node lives, what progress its leases made, and how the policy's versions come to it."""
        if self._member is not None and leases and tokens_per_s > 0:
            self._member.update(tokens_per_s=tokens_per_s)
        beat = Heartbeat(
            node_id=self.node_id,
            version=max(0, version),
            leases=leases,
            tokens_per_s=tokens_per_s,
            fetching=fetching,
            arrived=arrived,
        )
        return await self.call("heartbeat", beat, HeartbeatReply)

    async def submit(self, submission: Submission) -> SubmissionReply:
        """Hand in a lease's episodes; safe to repeat."""
        with self._member.transferring() if self._member is not None else nullcontext():
            return await self.call("submit", submission, SubmissionReply, SUBMIT_DEADLINE_S)

    async def leave(self) -> None:
        """Say goodbye; leases end at once."""
        await self._ask("leave", Leaving(node_id=self.node_id), Ack, deadline_s=3.0)


class Part(NamedTuple):
    """A node that has joined: what it was told, its link to the coordinator, its membership in the swarm."""

    reply: JoinReply
    link: RunLink
    member: Member


@asynccontextmanager
async def taking_part(
    fabric: Fabric,
    ticket: Ticket,
    role: SwarmRole,
    name: str,
    *,
    device: str = "cpu",
    threads: int = 1,
    measures_rates: bool = False,
    **facts: Any,
) -> AsyncIterator[Part]:
    """Join the ticket's run, and be a member of its swarm while inside.

    Args:
        measures_rates: of the link to the coordinator, for this node's record.
        facts: further fields of this node's record (`NodeRecord`).

    Raises:
        JoinRefused, NetworkError: why it cannot take part.
    """
    reply = await join(fabric, ticket, role, name, device=device, threads=threads)
    grants = GrantBook(ticket.run, ticket.coordinator_key)
    take_grants(reply, grants)
    roles = grants.roles(fabric.identity.public_key, time.time())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"name": name, "device": device, "memory_bytes": memory_bytes, **facts}
    record = profile(fabric, ticket.run, tuple(sorted(roles)), **facts)
    async with Member(
        fabric,
        ticket.run,
        ticket.coordinator_key,
        record,
        grants=grants,
        measures_delays=True,
        measures_rates=measures_rates,
    ) as member:
        yield Part(reply, RunLink(fabric, ticket, role, name, device, threads, member=member), member)


def take_grants(reply: JoinReply, grants: GrantBook) -> None:
    """Take in what the coordinator granted and what it has taken back."""
    now = time.time()
    if reply.revocations is not None:
        grants.merge_revocations(reply.revocations, now)
    for signed in reply.grants:
        grants.merge_grant(signed, now)


def work_spec(reply: JoinReply) -> WorkSpec:
    """The work described in a join reply."""
    if not reply.spec:
        raise RecordError("the coordinator's answer to the join request says nothing about the work.")
    return decode(reply.spec, WorkSpec)
