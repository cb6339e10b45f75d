"""One expert's life in a run: joined by ticket, a node of the collective, renewed in time, gone in order.

    ticket ──▶ taking_part ("agent") ──▶ Desk, CollectiveNode, episodes ──▶ … ──▶ leave

Invariants: the run's issuer is needed to join and to renew a grant, and for nothing else: while it is away the
collective goes on; nothing outlives the context.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from shoal.agents.collective.chains import LEASE_S
from shoal.agents.collective.episodes import EpisodeFile
from shoal.agents.collective.experts import Opened
from shoal.agents.collective.node import CollectiveNode, write_skills
from shoal.agents.collective.sharing import OwnEntries
from shoal.errors import JoinRefused, NetworkError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.fabric import Fabric
from shoal.fabric.ticket import Ticket
from shoal.rollout.link import Part, join, take_grants, taking_part

log = logging.getLogger("shoal.collective")

RENEW_AT = 0.75
"""A grant is renewed when this part of its life is over."""

RENEW_RETRY_S = 60.0

PATIENT_LISTENS_S = 0.5
"""Machines far from each other, and processes whose cores compute, answer later than a quiet machine's."""


@asynccontextmanager
async def living(
    fabric: Fabric,
    ticket: Ticket,
    name: str,
    expert: Opened | None,
    *,
    similar: Callable[[str, str], float],
    own: Path | None = None,
    episodes: Path | None = None,
    listens_s: float = PATIENT_LISTENS_S,
    lease_s: float = LEASE_S,
) -> AsyncIterator[CollectiveNode]:
    """A node of the ticket's collective, while inside.

    Args:
        expert: None: it only asks.
        own: file of what this identity says; None for one that ends with the process.
        episodes: file to which what it does is added.
        listens_s: at most so long are offers waited for; less where all have answered.
        lease_s: of a step without a sign of life.

    Raises:
        JoinRefused, NetworkError: why it cannot take part.
        StorageError: a file cannot be used.
    """
    settings = expert.settings if expert is not None else None
    kept = EpisodeFile(episodes, fabric.identity.node_id) if episodes is not None else None
    said = OwnEntries(own) if own is not None else None
    async with AsyncExitStack() as stack:
        skills = write_skills(settings.skills) if settings is not None else ""
        part = await stack.enter_async_context(taking_part(fabric, ticket, "agent", name, skills=skills))
        stack.push_async_callback(_leave, part)
        node = CollectiveNode(
            part.member,
            ticket.run,
            expert=expert.expert if expert is not None else None,
            writer=expert.writer if expert is not None else None,
            similar=similar,
            slots=settings.slots if settings is not None else 1,
            price_usd=settings.price_usd if settings is not None else 0.0,
            on_work=kept.on_work if kept is not None else None,
            on_plan=kept.on_plan if kept is not None else None,
            own=said,
            listens_s=listens_s,
            lease_s=lease_s,
        )
        await stack.enter_async_context(node)

        def account() -> Account:
            busy = node.executor.num_at_work
            counters = {"steps_done": node.executor.done, "steps_stopped": node.executor.stopped}
            return Account(doing=f"does {busy} steps" if busy else "waits for steps", counters=counters)

        await stack.enter_async_context(Desk(fabric, name, "agent", account, part.member.is_granted))
        renewing = asyncio.create_task(_renew(fabric, ticket, name, part))
        try:
            yield node
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)


async def _renew(fabric: Fabric, ticket: Ticket, name: str, part: Part) -> None:
    """Have the grant renewed before it ends; where nobody does, it holds until its end."""
    key, grants = fabric.identity.public_key, part.member.grants
    while True:
        ends_s = max(0.0, grants.until(key, frozenset({"agent"}), time.time()) - time.time())
        await asyncio.sleep(max(RENEW_RETRY_S, RENEW_AT * ends_s) * random.uniform(0.9, 1.0))
        try:
            take_grants(await join(fabric, ticket, "agent", name, renews=True), grants)
        except (NetworkError, JoinRefused) as error:
            log.warning("this node's grant is not renewed yet: %s", error)


async def _leave(part: Part) -> None:
    try:
        await part.link.leave()
    except NetworkError as error:
        log.info("the run's issuer does not hear the goodbye: %s", error)
