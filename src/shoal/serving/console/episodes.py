"""A run's episodes on disk: which steps have some, what is in one, and one in full.

Invariants: nothing is kept between calls, so a run of a million episodes costs no memory; at most `MAX_FILE_BYTES` of a
step's file are read at once; a line that is no episode is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import RecordError
from shoal.protocol.codec import from_json
from shoal.protocol.episode import Episode

STEP_FILE = re.compile(r"(\d{1,12})\.jsonl")
MAX_FILE_BYTES = 32 * 2**20
MAX_LISTED = 400
MAX_SEARCHED_STEPS = 20


@dataclass(frozen=True)
class Listed:
    """One episode in a list."""

    step: int
    index: int
    """Its line in the step's file, from 0."""
    env: str
    task: str
    reward: float
    outcome: str
    turns: int
    tokens: int
    version: int
    asked: str
    """The beginning of what it was asked."""


def steps(run: Path) -> list[int]:
    """Learner steps whose episodes are there, in order."""
    try:
        with os.scandir(run / "episodes") as entries:
            found = [STEP_FILE.fullmatch(entry.name) for entry in entries]
    except OSError:
        return []
    return sorted(int(match[1]) for match in found if match is not None)


def listed(run: Path, step: int, text: str = "") -> list[Listed]:
    """Up to `MAX_LISTED` episodes of a step, those that hold `text` somewhere."""
    found: list[Listed] = []
    for index, episode in _episodes(run, step):
        if len(found) == MAX_LISTED:
            break
        if text and not holds(episode, text):
            continue
        found.append(
            Listed(
                step=step,
                index=index,
                env=episode.task.env,
                task=episode.task.id,
                reward=episode.reward,
                outcome=episode.outcome,
                turns=len(episode.turns),
                tokens=episode.num_tokens,
                version=episode.version,
                asked=episode.turns[0].observation[:160] if episode.turns else "",
            )
        )
    return found


def search(run: Path, text: str) -> list[Listed]:
    """Episodes of the newest `MAX_SEARCHED_STEPS` steps that hold `text`, newest first, up to `MAX_LISTED`."""
    found: list[Listed] = []
    for step in reversed(steps(run)[-MAX_SEARCHED_STEPS:]):
        found += listed(run, step, text)[: MAX_LISTED - len(found)]
        if len(found) >= MAX_LISTED:
            break
    return found


def episode(run: Path, step: int, index: int) -> Episode | None:
    """One episode; None where it is not there."""
    for number, found in _episodes(run, step):
        if number == index:
            return found
    return None


def holds(episode: Episode, text: str) -> bool:
    """Whether a text occurs in the episode's task, observations or acts, in upper or lower case."""
    wanted = text.casefold()
    parts = [episode.task.id, episode.task.env, episode.worker, episode.output]
    for turn in episode.turns:
        parts += [turn.observation, turn.completion.text]
    return any(wanted in part.casefold() for part in parts)


def _episodes(run: Path, step: int) -> Iterator[tuple[int, Episode]]:
    path = run / "episodes" / f"{step:06d}.jsonl"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError:
        return
    for index, line in enumerate(data.split(b"\n")[:-1]):
        try:
            yield index, from_json(line, Episode)
        except RecordError:
            continue
