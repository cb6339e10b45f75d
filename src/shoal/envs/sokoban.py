"""Sokoban, turn by turn: the agent reads a grid, answers with moves, and reads the grid again.

A task carries its level as text, so every machine plays the same one. Which side a level is on is decided by a stable
hash of its text: no held-out level is ever trained on. An action that names no move is answered with a reminder and
costs a turn. The reward is 1 for the action that puts the last box on a goal, else 0.
"""

from __future__ import annotations

import re
from random import Random
from typing import ClassVar

from pydantic import Field

from shoal.envs.base import (
    Environment,
    EnvironmentSettings,
    Observation,
    Split,
    Step,
    check_cursor,
    stable_fraction,
    stable_int,
)
from shoal.envs.extract import last_line, tagged
from shoal.envs.sokoban_rules import DIRECTIONS, Level, generate, move, parse, render
from shoal.errors import TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task

MAX_DRAWS = 2_000
"""Levels drawn before the settings are taken to leave no room."""

RULES = """You play Sokoban. Push every box onto a goal.
# wall, . goal, $ box, * box on a goal, @ you, + you on a goal, - floor.
Moving into a box pushes it, unless a wall or another box is behind it. You cannot pull.
Answer with {moves} of: up, down, left, right."""


class SokobanSettings(EnvironmentSettings):
    """How large and how hard the levels are."""

    height: int = Field(default=5, ge=3, le=20)
    """Rows inside the border."""
    width: int = Field(default=5, ge=3, le=20)
    """Columns inside the border."""
    boxes: int = Field(default=1, ge=1, le=8)
    wall_fraction: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the inner cells that are walls."""
    pulls: int = Field(default=6, ge=1, le=200)
    """Pulls that make a level from a solved one: an upper bound on the pushes that solve it."""
    max_turns: int = Field(default=20, ge=1, le=1000)
    moves_per_turn: int = Field(default=8, ge=1, le=100)
    """Moves taken from one answer; what follows them is not played."""
    heldout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of all levels that is never trained on."""


class Sokoban(Environment):
    """One game a task."""

    Settings: ClassVar[type[EnvironmentSettings]] = SokobanSettings
    settings: SokobanSettings
    _level: Level | None = None
    _turns: int = 0
    _invalid: int = 0

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        s = self.settings
        rng = Random(stable_int("sokoban", split, seed, index))
        for _ in range(MAX_DRAWS):
            level = generate(
                rng, height=s.height, width=s.width, boxes=s.boxes, wall_fraction=s.wall_fraction, pulls=s.pulls
            )
            if level is None:
                continue
            text = render(level)
            if (stable_fraction("sokoban", text) < s.heldout_fraction) == (split == "heldout"):
                return Task(env=self.name, id=f"{stable_int(text):016x}", seed=0, data={"level": text})
        raise TaskError(
            f"environment {self.name!r} found no level for its settings.",
            "Give fewer boxes, more pulls, a larger room or a lower wall_fraction.",
        )

    async def reset(self, task: Task) -> Observation:
        drawn = task.data.get("level")
        try:
            self._level = parse(drawn if isinstance(drawn, str) else "")
        except ValueError as error:
            raise TaskError(f"task {task.id} of environment {self.name!r} holds no level: {error}.") from None
        self._turns = self._invalid = 0
        several = self.settings.moves_per_turn
        rules = RULES.format(moves="one" if several == 1 else f"one to {several}")
        return Observation((Message(role="user", content=f"{rules}\n\n{render(self._level)}"),))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        level = self._level
        if level is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        self._turns += 1
        remarks = []
        moves = read_moves(action)
        if not moves:
            self._invalid += 1
            remarks.append("There is no move in your answer. Name one of: up, down, left, right.")
        for direction in moves[: self.settings.moves_per_turn]:
            after = move(level, direction)
            if after is level:
                remarks.append(f"You cannot go {direction} there.")
            level = after
            if level.solved:
                break
        done = level.solved or self._turns >= self.settings.max_turns
        self._level = None if done else level
        info = {
            "solved": float(level.solved),
            "boxes_on_goals": level.num_boxes_on_goals / len(level.boxes),
            "turns": float(self._turns),
            "invalid_actions": float(self._invalid),
        }
        seen = "" if done else "\n".join([*dict.fromkeys(remarks), render(level)])
        return Step(seen, float(level.solved), done, info)


def read_moves(action: str) -> list[str]:
    """The moves that an answer names, in order: those between `<answer>` tags, else those in its last line."""
    text = tagged(action) or last_line(action)
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in DIRECTIONS]
