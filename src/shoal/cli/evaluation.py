"""An evaluation on quests as a folder that can be continued, and the loop that fills it.

    settings.json    what is measured     episodes.jsonl   one line an episode, written as soon as it is over
    summary.json     the scores           report.html      the scores and every episode, step by step

Invariants: an episode is in the folder once, however often the evaluation is continued; a folder holds one evaluation,
and none with other settings goes on in it; an episode that infrastructure spoilt is not in it, and is played again
when the evaluation is continued.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from shoal.coordinator.rundir import RunDir
from shoal.envs.evm.anvil import AnvilChain, Fork
from shoal.envs.evm.chain import ChainBackend
from shoal.envs.evm.definition import Definition
from shoal.envs.evm.evaluation import Constrain, Manner, Mode, Played, instance, play
from shoal.envs.evm.prompts import Acting
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.report import page
from shoal.envs.evm.scores import summarise
from shoal.envs.evm.speakers import ContextFull, Speaker
from shoal.errors import ConfigError, RecordError, RunError, ShoalError, StorageError
from shoal.protocol.codec import Record, from_json, read_jsonl

SETTINGS, EPISODES, SUMMARY, REPORT = "settings.json", "episodes.jsonl", "summary.json", "report.html"

MAX_VOIDS = 5
"""Episodes spoilt in a row after which an evaluation stops and says why."""


class Measured(Record, frozen=True):
    """What an evaluation measures; two with the same are the same."""

    model: str
    endpoint: str
    actions: Acting
    mode: Mode
    prompt: Literal["full", "brief"]
    constrain: Constrain
    tasks: tuple[str, ...]
    file: str
    official: str
    rounds: int
    seed: int
    max_tokens: int
    context_tokens: int
    temperature: float
    fork_url: str = ""
    """JSON-RPC of a live chain to fork; empty for the offline chain."""
    fork_block: int = 0

    def check(self) -> None:
        if not self.tasks or self.rounds < 1:
            raise RecordError("an evaluation has no tasks or no rounds.")


class Evaluation:
    """One evaluation's folder, kept to this process. Use as a context."""

    def __init__(self, path: Path, measured: Measured) -> None:
        """Raises: ConfigError where another evaluation is in the folder; RunError where one is going on in it."""
        self._folder = RunDir(path)
        self.path = self._folder.path
        self.measured = measured
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be made: {error.strerror}.", "Name another folder with --out.") from None
        self._folder.lock()
        try:
            self._check_settings()
            self._folder.cut_half_line(EPISODES)
            file = self.path / EPISODES
            found = {one.key: one for one in read_jsonl(file, Played)} if file.exists() else {}
        except BaseException:
            self._folder.close()
            raise
        self._played = found

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def _check_settings(self) -> None:
        if (self.path / SETTINGS).exists():
            before = read_measured(self.path)
            for name in Measured.__struct_fields__:
                old, new = getattr(before, name), getattr(self.measured, name)
                if old != new and not (name == "rounds" and new > old):
                    raise ConfigError(
                        f"{self.path} holds an evaluation with {name} = {str(old)[:100]}, not {str(new)[:100]}.",
                        "Name another folder with --out, or continue it as it is with --resume.",
                    )
        content = json.dumps(msgspec.to_builtins(self.measured), indent=1)
        self._folder.write_atomic(SETTINGS, content.encode())

    @property
    def played(self) -> list[Played]:
        """What there is of it so far."""
        wanted = set(self.measured.tasks)
        return [one for one in self._played.values() if one.task in wanted and one.round < self.measured.rounds]

    @property
    def total(self) -> int:
        return len(self.measured.tasks) * self.measured.rounds

    def missing(self) -> list[tuple[str, int]]:
        """Task and round of what is still to be played, round by round."""
        every = [(task, number) for number in range(self.measured.rounds) for task in self.measured.tasks]
        return [key for key in every if key not in self._played]

    def keep(self, one: Played) -> None:
        """Add an episode."""
        assert one.key not in self._played, "an episode is played once"
        self._folder.append_record(EPISODES, one)
        self._played[one.key] = one

    def discard(self) -> None:
        """Remove the folder if this evaluation made it: nothing came of it."""
        self._folder.discard_unstarted()

    def finish(self, facts: dict[str, str]) -> dict[str, Any]:
        """Write summary and report, and give the summary."""
        played = self.played
        found = summarise(played, num_tasks=len(self.measured.tasks), rounds=self.measured.rounds)
        self._folder.write_atomic(SUMMARY, json.dumps(found, indent=1, allow_nan=False).encode())
        title = f"Quests on an EVM chain: {self.measured.model}"
        self._folder.write_atomic(REPORT, page(title, facts, found, played).encode("utf-8", "replace"))
        return found


def read_measured(path: Path) -> Measured:
    """What the evaluation in a folder measures.

    Raises:
        RunError: there is none.
        StorageError: its settings are damaged.
    """
    try:
        content = (path / SETTINGS).read_bytes()
    except OSError:
        raise RunError(f"there is no evaluation in {path}.", "Begin one with shoal eval evm --out FOLDER.") from None
    try:
        return from_json(content, Measured)
    except RecordError as error:
        raise StorageError(f"{path / SETTINGS} is damaged: {error.problem}", "Begin anew in another folder.") from None


async def play_all(
    evaluation: Evaluation,
    definitions: Sequence[Definition],
    speaker: Speaker,
    manner: Manner,
    *,
    concurrency: int,
    on_played: Callable[[Played], None],
    on_void: Callable[[str], None],
) -> None:
    """Play what is missing, `concurrency` episodes at once, each on a chain of its own.

    Args:
        on_void: told why an episode was spoilt; it stays missing.

    Raises:
        ShoalError: nothing can be played like this, or `MAX_VOIDS` episodes in a row were spoilt.
    """
    known = {definition.id: definition for definition in definitions}
    waiting = iter(evaluation.missing())
    voids = 0

    async def work() -> None:
        nonlocal voids
        chain = await _chain(evaluation.measured)
        try:
            for task, number in waiting:
                wanted = instance(known[task], number, evaluation.measured.seed)
                try:
                    one = await play(wanted, number, speaker, manner, chain)
                except (ConfigError, ContextFull):
                    raise
                except ShoalError as error:
                    voids += 1
                    on_void(f"{task}, round {number + 1}: {error}")
                    if voids >= MAX_VOIDS:
                        raise
                    continue
                voids = 0
                evaluation.keep(one)
                on_played(one)
        finally:
            chain.close()

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(evaluation.missing())))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _chain(measured: Measured) -> ChainBackend:
    """A chain for one episode after the other: offline, or a fork of a live one."""
    if not measured.fork_url:
        return PyrevmChain()
    return await asyncio.to_thread(lambda: AnvilChain(fork=Fork(measured.fork_url, measured.fork_block)))
