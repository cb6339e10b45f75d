"""Methods on problems, their answers kept in files, and tables of them beside the collective's."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.agents.collective.answers import is_right
from shoal.agents.collective.baselines import Tried, central, direct, self_consistency
from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.work import Expert, Plan, Writer
from shoal.coordinator.reporting.paired import paired_interval

PLANNERS = 3
AT_ONCE = 12
TIMEOUT_S = 300.0

Rows = list[dict[str, Any]]


def say(text: str) -> None:
    print(f"collective: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Asked:
    """One problem as all methods are asked it."""

    number: int
    text: str
    truth: str
    kind: str = ""
    """What rows are made of."""


@dataclass
class Counted:
    """A writer that counts what became of its chains."""

    writer: Writer
    written: int = 0
    parsed: int = 0

    async def write(self, text: str, skills: Sequence[str]) -> Plan:
        """As the writer that it stands for."""
        self.written += 1
        plan = await self.writer.write(text, skills)
        self.parsed += plan.as_asked
        return plan


class Answers:
    """One method's answers in a file, a line a problem."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[int, dict[str, Any]] = {(row := json.loads(line))["number"]: row for line in lines}

    def add(self, asked: Asked, tried: Tried, **more: Any) -> None:
        """Keep one."""
        row = {
            "number": asked.number,
            "kind": asked.kind,
            "problem": asked.text,
            "truth": asked.truth,
            "answer": tried.answer,
            "right": is_right(tried.answer, asked.truth),
            "tokens": tried.tokens,
            "seconds": tried.seconds,
            **more,
        }
        self.found[asked.number] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


Solve = Callable[[Asked], Awaitable[None]]


async def each(name: str, answers: Answers, problems: Sequence[Asked], solve: Solve) -> None:
    """All problems without an answer, some at once."""
    left = [one for one in problems if one.number not in answers.found]
    slots = asyncio.Semaphore(AT_ONCE)
    done = 0

    async def one(asked: Asked) -> None:
        nonlocal done
        async with slots:
            await solve(asked)
        done += 1
        if done % 20 == 0 or done == len(left):
            right = statistics.mean(row["right"] for row in answers.found.values())
            say(f"{name}: {done} of {len(left)}, {right:.2f} right")

    await asyncio.gather(*(one(asked) for asked in left))


def asking(answers: Answers, expert: Expert) -> Solve:
    async def solve(asked: Asked) -> None:
        answers.add(asked, await direct(expert, asked.text))

    return solve


def consistent(answers: Answers, expert: Expert, collective: Answers) -> Solve:
    async def solve(asked: Asked) -> None:
        answers.add(asked, await self_consistency(expert, asked.text, collective.found[asked.number]["tokens"]))

    return solve


def together(node: CollectiveNode, answers: Answers) -> Solve:
    async def solve(asked: Asked) -> None:
        found = await node.solve(asked.text, planners=PLANNERS, timeout_s=TIMEOUT_S)
        tried = Tried("collective", found.answer, found.tokens, found.seconds, len(found.chains))
        finished = sum(chain.answer is not None for chain in found.chains)
        answers.add(asked, tried, chains=len(found.chains), finished=finished)

    return solve


def centrally(node: CollectiveNode, writer: Writer, answers: Answers) -> Solve:
    async def solve(asked: Asked) -> None:
        answers.add(asked, await central(node, writer, asked.text, node.skills(), TIMEOUT_S))

    return solve


def table(part: str, found: dict[str, Answers], problems: Sequence[Asked]) -> Rows:
    """One row a method, each beside the collective, problem by problem."""
    ours = [found["collective"].found[one.number] for one in problems]
    rows: Rows = []
    for name, answers in found.items():
        theirs = [answers.found[one.number] for one in problems]
        low, high = paired_interval([row["right"] for row in theirs], [row["right"] for row in ours])
        row = {"part": part, "method": name, "problems": len(problems), "right": share(theirs)}
        for kind in sorted({one.kind for one in problems}):
            row[f"right_{kind}"] = share(one for one in theirs if one["kind"] == kind)
        row["tokens"] = statistics.mean(one["tokens"] for one in theirs)
        row["seconds"] = statistics.mean(one["seconds"] for one in theirs)
        row["collective_minus"] = share(ours) - share(theirs)
        row["collective_minus_interval"] = [low, high]
        rows.append(row)
    return rows


def share(rows: Iterable[dict[str, Any]]) -> float:
    """Of right answers; 0 where there are none at all."""
    found = [float(row["right"]) for row in rows]
    return statistics.mean(found) if found else 0.0
