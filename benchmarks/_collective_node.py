"""One node of a collective as a process of its own: joins, does scripted steps of a fixed time, ends with its parent.

Reads one line of JSON from its standard input (`Setup`), prints `ready` when everybody is there, and lives until that
input ends.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import msgspec

from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.work import NoChain, PlannedStep, SubTask, Work
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.protocol.roster import SignedRecord
from shoal.swarm.grants import GrantBook
from shoal.swarm.member import Member, profile

RUN = "collective"
SKILLS = ("sums of numbers", "products of numbers")
WAIT_S = 120.0


class Setup(msgspec.Struct):
    """What a node is told at its start."""

    seed: str
    """Of its identity, hexadecimal."""
    ticket: str
    root: bytes
    grant: SignedRecord
    step_s: float
    accuracy: float
    others: int
    """Wait until so many other agents are here."""
    listens_s: float
    lease_s: float


class Reckoner:
    """Reckons `a + b` or `a * b` in a fixed time, and is right with a fixed probability."""

    claims: Mapping[str, float] = dict.fromkeys(SKILLS, 0.5)

    def __init__(self, step_s: float, accuracy: float, draw: Random) -> None:
        self._step_s = step_s
        self._accuracy = accuracy
        self._draw = draw

    async def act(self, task: SubTask) -> Work:
        await asyncio.sleep(self._step_s)
        words = task.task
        for step, result in task.needed.items():
            words = words.replace(f"${step}", result)
        a, operator, b = words.split()
        value = int(a) + int(b) if operator == "+" else int(a) * int(b)
        if self._draw.random() >= self._accuracy:
            value += self._draw.randint(1, 9)
        return Work(str(value), tokens=len(words))


class Reading:
    """Writes `3 * 4 + 5 * 6`, read from left to right, as one step an operator."""

    async def write(self, problem: str, skills: Sequence[str]) -> list[PlannedStep]:
        if not re.fullmatch(r"\d+( [+*] \d+)+", problem):
            raise NoChain("that is no problem of this benchmark.")
        first, *rest = problem.split()
        steps: list[PlannedStep] = []
        for operator, number in zip(rest[::2], rest[1::2], strict=True):
            left = f"${len(steps) - 1}" if steps else first
            needs = (len(steps) - 1,) if steps else ()
            steps.append(PlannedStep(SKILLS[operator == "*"], f"{left} {operator} {number}", needs))
        return steps


def answer_of(problem: str) -> str:
    """What a problem comes to, from left to right."""
    first, *rest = problem.split()
    value = int(first)
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        value = value + int(number) if operator == "+" else value * int(number)
    return str(value)


def same(requirement: str, skill: str) -> float:
    """Requirements of this benchmark are skills."""
    return float(requirement == skill)


async def enter(stack: AsyncExitStack, setup: Setup, fabric: Fabric, *, asks_only: bool = False) -> CollectiveNode:
    """A node of the collective on an open fabric."""
    grants = GrantBook(RUN, setup.root)
    grants.merge_grant(setup.grant, time.time())
    member = Member(fabric, RUN, setup.root, profile(fabric, RUN, ("agent",)), grants=grants)
    await stack.enter_async_context(member)
    draw = Random(setup.seed)
    expert = None if asks_only else Reckoner(setup.step_s, setup.accuracy, draw)
    node = CollectiveNode(
        member,
        RUN,
        expert=expert,
        writer=None if asks_only else Reading(),
        similar=same,
        slots=4,
        listens_s=setup.listens_s,
        lease_s=setup.lease_s,
    )
    return await stack.enter_async_context(node)


async def everybody(node: CollectiveNode, others: int) -> None:
    """Wait until a node sees so many other agents."""
    async with asyncio.timeout(WAIT_S):
        while node.num_peers < others:  # noqa: ASYNC110  The roster's changes are many; a look now and then is cheaper.
            await asyncio.sleep(0.1)


async def live(setup: Setup) -> None:
    """Take part until the parent's pipe closes."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        identity = Identity(bytes.fromhex(setup.seed))
        fabric = await Fabric.connect(identity, Ticket.decode(setup.ticket), deadline_s=60.0)
        await stack.enter_async_context(fabric)
        node = await enter(stack, setup, fabric)
        await everybody(node, setup.others)
        print("ready", flush=True)
        await loop.run_in_executor(None, sys.stdin.buffer.read)


def main() -> None:
    setup: Any = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    asyncio.run(live(setup))


if __name__ == "__main__":
    main()
