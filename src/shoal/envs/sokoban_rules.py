"""The game of Sokoban: levels, moves, and levels made by playing backwards.

Pure functions on immutable levels. Invariants: the number of boxes equals the number of goals; a move never puts two
things on one cell; every generated level is solvable, because each pull that made it can be undone by a push.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from random import Random

Cell = tuple[int, int]
"""Row and column, from the top left."""

DIRECTIONS: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

MAX_SIDE = 32


@dataclass(frozen=True, slots=True)
class Level:
    """One position of the game."""

    height: int
    width: int
    walls: frozenset[Cell]
    goals: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell

    @property
    def num_boxes_on_goals(self) -> int:
        return len(self.boxes & self.goals)

    @property
    def solved(self) -> bool:
        return self.boxes == self.goals


def render(level: Level) -> str:
    """The level in the usual letters: # wall, . goal, $ box, * box on a goal, @ player, + player on a goal, - floor."""

    def letter(cell: Cell) -> str:
        on_goal = cell in level.goals
        if cell in level.walls:
            return "#"
        if cell == level.player:
            return "+" if on_goal else "@"
        if cell in level.boxes:
            return "*" if on_goal else "$"
        return "." if on_goal else "-"

    return "\n".join("".join(letter((row, col)) for col in range(level.width)) for row in range(level.height))


def parse(text: str) -> Level:
    """The level drawn in `text`; raises `ValueError` where it is none."""
    rows = text.split("\n")
    cells = {(r, c): letter for r, row in enumerate(rows) for c, letter in enumerate(row)}
    if not 3 <= len(rows) <= MAX_SIDE or not 3 <= len(rows[0]) <= MAX_SIDE or len({len(row) for row in rows}) != 1:
        raise ValueError("a level is a rectangle of 3 to 32 cells a side")

    def where(letters: str) -> frozenset[Cell]:
        return frozenset(cell for cell, letter in cells.items() if letter in letters)

    players, boxes, goals, walls = where("@+"), where("$*"), where(".*+"), where("#")
    border = {cell for cell in cells if cell[0] in (0, len(rows) - 1) or cell[1] in (0, len(rows[0]) - 1)}
    if set(cells.values()) - set("#.$*@+-") or len(players) != 1 or len(boxes) != len(goals) or not border <= walls:
        raise ValueError("a level has one player, as many boxes as goals, and walls all round")
    return Level(len(rows), len(rows[0]), walls, goals, boxes, next(iter(players)))


def beside(cell: Cell, direction: str, steps: int = 1) -> Cell:
    """The cell `steps` cells away in a direction."""
    down, right = DIRECTIONS[direction]
    return cell[0] + steps * down, cell[1] + steps * right


def move(level: Level, direction: str) -> Level:
    """The level after a move; the same object where a wall or a stuck box is in the way."""
    target = beside(level.player, direction)
    if target in level.walls:
        return level
    if target not in level.boxes:
        return replace(level, player=target)
    beyond = beside(target, direction)
    if beyond in level.walls or beyond in level.boxes:
        return level
    return replace(level, player=target, boxes=level.boxes - {target} | {beyond})


def reachable(level: Level) -> frozenset[Cell]:
    """The cells that the player can walk to without pushing."""
    seen, queue = {level.player}, deque([level.player])
    while queue:
        cell = queue.popleft()
        for direction in DIRECTIONS:
            step = beside(cell, direction)
            if step not in level.walls and step not in level.boxes and step not in seen:
                seen.add(step)
                queue.append(step)
    return frozenset(seen)


def _pulls(level: Level) -> list[Level]:
    """The levels one pull away: the player stands beside a box, steps back and takes the box along."""
    found, free = [], reachable(level)
    for box in sorted(level.boxes):
        for direction in DIRECTIONS:
            stand, back = beside(box, direction), beside(box, direction, 2)
            if stand in free and back not in level.walls and back not in level.boxes:
                found.append(replace(level, player=back, boxes=level.boxes - {box} | {stand}))
    return found


def generate(rng: Random, *, height: int, width: int, boxes: int, wall_fraction: float, pulls: int) -> Level | None:
    """A level with `height` x `width` cells inside its border, made by `pulls` random pulls from a solved one.

    None where this draw of walls leaves no room or no pull; the caller draws again.
    """
    inside = [(row, col) for row in range(1, height + 1) for col in range(1, width + 1)]
    outside = {(row, col) for row in range(height + 2) for col in range(width + 2)} - set(inside)
    walls = frozenset(outside | {cell for cell in inside if rng.random() < wall_fraction})
    floor = [cell for cell in inside if cell not in walls]
    if len(floor) < boxes + 2:
        return None
    *goals, player = rng.sample(floor, boxes + 1)
    level = Level(height + 2, width + 2, walls, frozenset(goals), frozenset(goals), player)
    for _ in range(pulls):
        options = _pulls(level)
        if not options:
            break
        level = rng.choice(options)
    if level.boxes & level.goals:
        return None
    return replace(level, player=rng.choice(sorted(reachable(level))))
