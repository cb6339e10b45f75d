"""Nodes of a collective to test with: real fabrics on loopback, scripted experts and writers."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.work import Expert, NoChain, Plan, PlannedStep, StepFailed, SubTask, Work, Writer
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.protocol.roster import SwarmRole
from shoal.swarm.grants import GrantBook, issue
from shoal.swarm.member import Member, profile

RUN = "collective"
SECRET = b"0123456789abcdef"
AGENT: tuple[SwarmRole, ...] = ("agent",)


def identity(name: str) -> Identity:
    """The identity with this name, the same each time."""
    return Identity(hashlib.sha256(name.encode()).digest())


ROOT = identity("collective root")


def alike(requirement: str, skill: str) -> float:
    """Whether they share a word."""
    return float(bool(set(requirement.split()) & set(skill.split())))


@dataclass
class Script:
    """An expert that reckons `a + b` or `a * b` in its task, and remembers what it was told."""

    claims: Mapping[str, float] = field(default_factory=dict)
    takes_s: float = 0.0
    lies: bool = False
    fails: bool = False
    told: list[SubTask] = field(default_factory=list)

    async def act(self, task: SubTask) -> Work:
        self.told.append(task)
        await asyncio.sleep(self.takes_s)
        if self.fails:
            raise StepFailed("it is not to be done.")
        words = task.task
        for step, result in task.needed.items():
            words = words.replace(f"${step}", result)
        found = re.search(r"(\d+) ([+*]) (\d+)", words)
        assert found is not None
        a, b = int(found[1]), int(found[3])
        value = a + b if found[2] == "+" else a * b
        return Work(str(value + self.lies), tokens=len(words))


class Halves:
    """Writes `(a * b) + c` as a product and a sum that needs it."""

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        found = re.fullmatch(r"\((\d+ \* \d+)\) \+ (\d+)", problem)
        if found is None:
            raise NoChain("that is no sum.")
        return Plan([PlannedStep("a product", found[1]), PlannedStep("a sum", f"$0 + {found[2]}", needs=(0,))])


async def granted(stack: AsyncExitStack, name: str, ticket: Ticket) -> Member:
    """Somebody who may take part, and is in the roster."""
    key = identity(name)
    fabric = await stack.enter_async_context(await Fabric.connect(key, ticket))
    now = time.time()
    grants = GrantBook(RUN, ROOT.public_key)
    grants.merge_grant(issue(ROOT, RUN, key.public_key, AGENT, now, 3600.0), now)
    return await stack.enter_async_context(
        Member(fabric, RUN, ROOT.public_key, profile(fabric, RUN, AGENT, name=name), grants=grants)
    )


async def enter(
    stack: AsyncExitStack,
    listener: Fabric,
    name: str,
    expert: Expert | None,
    writer: Writer | None = None,
    ticket: Ticket | None = None,
    **settings: object,
) -> CollectiveNode:
    """One more node; with a ticket, by another way than the listener's own."""
    member = await granted(stack, name, ticket or listener.ticket(RUN, SECRET))
    settings = {"listens_s": 1.0, "share_every_s": 0.2, "lease_s": 1.5, **settings}
    node = CollectiveNode(member, RUN, expert=expert, writer=writer, similar=alike, **settings)  # type: ignore[arg-type]
    return await stack.enter_async_context(node)


async def eventually(holds: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  What is waited for knows nothing of tests.
            await asyncio.sleep(0.05)
