"""One node of a collective as a process of its own: joins by ticket, does scripted steps of a fixed time, ends with its
parent.

Reads one line of JSON from its standard input (`Setup`), prints `ready` when everybody is there, and then answers
questions (`Question`), a line each, until that input ends.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import msgspec

from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.work import NoChain, Plan, PlannedStep, SubTask, Work
from shoal.coordinator.processes import die_with_parent
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.protocol.ledger import Contribution
from shoal.rollout.link import taking_part

SKILLS = ("sums of numbers", "products of numbers")
WAIT_S = 180.0


class Setup(msgspec.Struct):
    """What a node is told at its start."""

    seed: str
    """Of its identity, hexadecimal."""
    ticket: str
    step_s: float
    accuracy: float
    others: int
    """Wait until so many other agents are here."""
    listens_s: float
    lease_s: float


class Question(msgspec.Struct):
    """What a node may be asked while it lives."""

    id: int
    problem: str = ""
    """To solve; empty: what does the ledger say?"""
    planners: int = 3
    timeout_s: float = 90.0


class Reckoner:
    """Reckons `a + b` or `a * b` in a fixed time; whether it errs follows from its seed and the step's words."""

    claims: Mapping[str, float] = dict.fromkeys(SKILLS, 0.5)

    def __init__(self, step_s: float, accuracy: float, seed: str) -> None:
        self._step_s = step_s
        self._accuracy = accuracy
        self._seed = seed
        self.done = 0
        """Steps executed to their end, whether or not anybody still wanted them."""

    async def act(self, task: SubTask) -> Work:
        await asyncio.sleep(self._step_s)
        words = task.task
        for step, result in task.needed.items():
            words = words.replace(f"${step}", result)
        a, operator, b = words.split()
        value = int(a) + int(b) if operator == "+" else int(a) * int(b)
        draw = Random(f"{self._seed} {words}")
        if draw.random() >= self._accuracy:
            value += draw.randint(1, 9)
        self.done += 1
        return Work(str(value), tokens=len(words))


class Reading:
    """Writes `3 * 4 + 5 * 6`, read from left to right, as one step an operator."""

    async def write(self, problem: str, skills: Sequence[str]) -> Plan:
        if not re.fullmatch(r"\d+( [+*] \d+)+", problem):
            raise NoChain("that is no problem of this benchmark.")
        first, *rest = problem.split()
        steps: list[PlannedStep] = []
        for operator, number in zip(rest[::2], rest[1::2], strict=True):
            left = f"${len(steps) - 1}" if steps else first
            needs = (len(steps) - 1,) if steps else ()
            steps.append(PlannedStep(SKILLS[operator == "*"], f"{left} {operator} {number}", needs))
        return Plan(steps)


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


async def enter(
    stack: AsyncExitStack, setup: Setup, name: str, *, asks_only: bool = False
) -> tuple[CollectiveNode, Reckoner]:
    """A node of the collective that the ticket is for, and the expert in it."""
    ticket = Ticket.decode(setup.ticket)
    fabric = await Fabric.connect(Identity(bytes.fromhex(setup.seed)), ticket, deadline_s=60.0)
    await stack.enter_async_context(fabric)
    part = await stack.enter_async_context(taking_part(fabric, ticket, "agent", name))
    expert = Reckoner(setup.step_s, setup.accuracy, setup.seed)
    node = CollectiveNode(
        part.member,
        ticket.run,
        expert=None if asks_only else expert,
        writer=None if asks_only else Reading(),
        similar=same,
        slots=4,
        listens_s=setup.listens_s,
        lease_s=setup.lease_s,
    )
    return await stack.enter_async_context(node), expert


async def everybody(node: CollectiveNode, others: int) -> None:
    """Wait until a node sees so many other agents."""
    async with asyncio.timeout(WAIT_S):
        while node.num_peers < others:  # noqa: ASYNC110  The roster's changes are many; a look now and then is cheaper.
            await asyncio.sleep(0.1)


def accounts(node: CollectiveNode, expert: Reckoner) -> dict[str, Any]:
    """What a node's ledger says, and what it did itself."""
    said = [entry.what for _, entry in node.ledger.entries() if isinstance(entry.what, Contribution)]
    delivered = Counter((one.chain, one.step) for one in said if one.delivery == "delivered")
    return {
        "root": node.ledger.root.hex(),
        "delivered": delivered.total(),
        "doubled": sum(count - 1 for count in delivered.values()),
        "late": sum(one.delivery == "late" for one in said),
        "convicted": len(node.ledger.convicted),
        "executed": expert.done,
        "peers": node.num_peers,
    }


async def answered(node: CollectiveNode, expert: Reckoner, question: Question) -> dict[str, Any]:
    """What a question gets."""
    if not question.problem:
        return {"id": question.id, **accounts(node, expert)}
    found = await node.solve(question.problem, planners=question.planners, timeout_s=question.timeout_s)
    return {"id": question.id, "answer": found.answer, "seconds": found.seconds}


async def live(setup: Setup) -> None:
    """Take part until the parent's pipe closes."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    async with AsyncExitStack() as stack:
        node, expert = await enter(stack, setup, setup.seed[:8])
        await everybody(node, setup.others)
        print("ready", flush=True)

        async def answer(question: Question) -> None:
            print(msgspec.json.encode(await answered(node, expert, question)).decode(), flush=True)

        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            task = asyncio.create_task(answer(msgspec.json.decode(line, type=Question)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    die_with_parent()
    setup: Any = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    asyncio.run(live(setup))


if __name__ == "__main__":
    main()
