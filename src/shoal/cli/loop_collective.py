"""The collective's part in the loop: its door, what it is asked before and after, and what it practises in between.

    before   exercises of the training split ──▶ steps.jsonl ──▶ in the stream as an environment (`Steps`)
             held-out problems ──▶ problems-before.jsonl
    train    exercises and problems of the training split, one after the other, while versions come
    after    the same held-out problems ──▶ problems-after.jsonl

Invariants: what is held out is never asked while episodes are kept, so nothing of it is trained on; a problem that was
asked is not asked again when the stage is resumed; a problem has an answer within its time or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tomli_w

from shoal.agents.collective.answers import is_right
from shoal.agents.collective.experts import expert_of
from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.problems import SKILLS, exercise, problem
from shoal.cli.agent_join import bringing
from shoal.cli.issuing import TICKET, issuing
from shoal.cli.loop_state import LoopFolder, When, lines_of
from shoal.config import Config
from shoal.envs.base import stable_int
from shoal.errors import NetworkError, ShoalError
from shoal.fabric.identity import node_id_of
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode, Task

MEET_S = 300.0
"""A busy machine takes minutes to load a model."""

LEAVE_S = 20.0
"""Experts that were told to end are gone by then, or are taken to be."""

EXERCISE_S = 60.0
PROBLEM_EVERY = 4
"""One in so many turns of practice is a whole problem."""

STEPS, STEPS_TYPE = "steps.jsonl", "shoal.agents.collective.environment:Steps"
PRACTICE = "practice.jsonl"
RANGE = 10**15


class Gathered:
    """The collective as the loop sees it: from the node that poses problems.

    Args:
        door: folder of the collective's door.
    """

    def __init__(self, node: CollectiveNode, config: Config, folder: LoopFolder, door: Path) -> None:
        self._node, self._config, self._loop, self._folder = node, config, config.loop, folder
        self._experts = {
            name: expert_of({"name": name, **table}, "loop.experts") for name, table in config.loop.experts.items()
        }
        self.ticket_file = door / TICKET

    def arguments(self, model: str, *, follow: Path | None = None, episodes: Path | None = None) -> list[str]:
        """What `shoal` is called with to bring the experts, all of them this model."""
        tables = [
            {"model": model, "dtype": self._config.model.dtype, **table, "name": name}
            for name, table in self._loop.experts.items()
        ]
        file = self._folder.path / "experts.toml"
        file.write_text(tomli_w.dumps({"expert": tables}))
        found = ["agent", "join", str(self.ticket_file), "--experts", str(file), "--grace", "2"]
        found += ["--threads", str(self._config.workers.threads), "--device", self._config.workers.device]
        found += ["--follow", str(follow)] if follow is not None else []
        return found + (["--episodes", str(episodes)] if episodes is not None else [])

    async def present(self) -> None:
        """Wait until all experts of this machine are here.

        Raises:
            NetworkError: they do not come.
        """
        if not await self._until(lambda: self._node.num_peers >= len(self._experts), MEET_S):
            raise NetworkError(
                f"only {self._node.num_peers} of {len(self._experts)} experts joined.", "See logs/agents.log."
            )

    async def absent(self) -> None:
        """Wait until those that were here have gone."""
        await self._until(lambda: self._node.num_peers == 0, LEAVE_S)

    async def _until(self, holds: Callable[[], bool], deadline_s: float) -> bool:
        for _ in range(int(deadline_s / 0.1)):
            if holds():
                return True
            await asyncio.sleep(0.1)
        return holds()

    # Held out

    async def examine(self, when: When) -> None:
        """Have the held-out problems solved that have not been yet."""
        name = f"problems-{when}.jsonl"
        asked = {line["number"] for line in self._folder.lines(name)}
        gate = asyncio.Semaphore(self._loop.at_once)
        seed = self._config.run.seed

        async def one(number: int) -> None:
            made = problem("heldout", stable_int("loop", seed, number) % RANGE)
            async with gate:
                found = await self._solved(made.text, made.answer)
            self._folder.add(name, number=number, problem=made.text, expected=made.answer, **found)

        await asyncio.gather(*(one(number) for number in range(self._loop.problems) if number not in asked))
        await self._node.told()

    async def _solved(self, text: str, answer: str) -> dict[str, Any]:
        found = await self._node.solve(
            text,
            planners=self._loop.planners,
            timeout_s=self._loop.problem_timeout_s,
            score=lambda said: float(is_right(said, answer)),
        )
        right = found.answer is not None and is_right(found.answer, answer)
        chains = [{"answer": chain.answer, "steps": len(chain.steps), "reason": chain.reason} for chain in found.chains]
        return {"answer": found.answer, "right": right, "seconds": round(found.seconds, 2), "chains": chains}

    # Practice

    async def begin(self, episodes: Path) -> None:
        """Exercises before training begins; what was right of them is `steps.jsonl`.

        Args:
            episodes: to which the experts add what they do.
        """
        if (self._folder.path / STEPS).exists():
            return
        for number in range(self._loop.practice):
            await asyncio.gather(*(self._exercise(key, name, number) for key, name in self._own()))
        await self._node.told()
        self._folder.files.write_atomic(STEPS, _whole_lines(episodes))

    async def practise(self) -> None:
        """Exercises and problems, one after the other, until cancelled."""
        turn = sum(1 for _ in lines_of(self._folder.path / PRACTICE))
        while True:
            try:
                if turn % PROBLEM_EVERY == PROBLEM_EVERY - 1:
                    await self._problem(turn)
                else:
                    own = self._own()
                    if own:
                        await self._exercise(*own[turn % len(own)], self._loop.practice + turn)
            except ShoalError as error:
                self._folder.add(PRACTICE, turn=turn, what="nothing", reason=str(error)[:300])
            turn += 1
            await asyncio.sleep(self._loop.practice_every_s)

    def _own(self) -> list[tuple[bytes, str]]:
        """Key and name of the experts of this loop that are here."""
        here = [(key, self._node.name_of(node_id_of(key))) for key in self._node.peers()]
        return sorted((item for item in here if item[1] in self._experts), key=lambda item: item[1])

    async def _problem(self, turn: int) -> None:
        made = problem("train", stable_int("practice", self._config.run.seed, turn) % RANGE)
        found = await self._solved(made.text, made.answer)
        self._folder.add(PRACTICE, turn=turn, what="problem", right=found["right"], seconds=found["seconds"])

    async def _exercise(self, key: bytes, name: str, number: int) -> None:
        """One exercise of each skill that an expert says it has: the ledger learns who can do what."""
        for skill in (skill for skill in self._experts[name].skills if skill in SKILLS):
            drawn = stable_int("exercise", self._config.run.seed, number) % RANGE
            words, answer = exercise(skill, "train", drawn)
            task = Task(env=skill, id=f"train-{drawn}", seed=0)
            score = await self._node.calibrate(key, skill, task, words, _scoring(answer), EXERCISE_S)
            self._folder.add(PRACTICE, turn=number, what="exercise", skill=skill, expert=name, right=score == 1.0)


def _whole_lines(path: Path) -> bytes:
    """A file that another process adds lines to, without the one that it is at."""
    kept = path.read_bytes() if path.exists() else b""
    return kept[: kept.rfind(b"\n") + 1]


def _scoring(answer: str) -> Callable[[str], float]:
    return lambda said: float(is_right(said, answer))


def has_steps(path: Path) -> bool:
    """Whether something in a file of episodes can be learnt from."""
    return path.exists() and any(
        one.outcome == "done" and one.reward == 1.0 and "requirement" in one.task.data
        for one in read_jsonl(path, Episode)
    )


def steps_settings(path: Path) -> Mapping[str, Any]:
    """Of the environment in which the collective's steps are done again; what is measured is measured elsewhere."""
    return {"path": str(path), "heldout_fraction": 0.0}


@asynccontextmanager
async def gathering(config: Config, folder: LoopFolder) -> AsyncIterator[Gathered]:
    """The collective's door is open, and a node that asks is in, while inside."""
    door = folder.path / "collective"
    network = config.network
    async with (
        issuing(door, host=network.host, port=0, routers=network.routers) as issuer,
        bringing(issuer.ticket, "poser", None) as node,
    ):
        yield Gathered(node, config, folder, door)
