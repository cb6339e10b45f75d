"""Sokoban: every generated level can be solved, the rules hold, and an episode ends when it should."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.envs.registry import make
from shoal.envs.sokoban import read_moves
from shoal.envs.sokoban_rules import DIRECTIONS, Level, generate, move, parse, render
from shoal.errors import TaskError
from shoal.protocol.episode import Task

CORRIDOR = "#####\n#@$.#\n#####"


def solve(level: Level) -> list[str] | None:
    """The reference solver: breadth first over positions of player and boxes, so its solutions are shortest."""
    paths: dict[tuple[object, ...], list[str]] = {(level.player, level.boxes): []}
    queue = deque([level])
    while queue:
        here = queue.popleft()
        path = paths[here.player, here.boxes]
        if here.solved:
            return path
        for direction in DIRECTIONS:
            there = move(here, direction)
            if (there.player, there.boxes) not in paths:
                paths[there.player, there.boxes] = [*path, direction]
                queue.append(there)
    return None


SHAPES = [
    {},
    {"height": 4, "width": 6, "boxes": 2, "pulls": 8},
    {"height": 6, "width": 6, "wall_fraction": 0.3, "pulls": 30},
    {"height": 3, "width": 3, "wall_fraction": 0.0, "pulls": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_level_is_solved_by_the_reference_solver(shape: dict[str, float]) -> None:
    env = make("sokoban", {"max_turns": 1, "moves_per_turn": 100, **shape})
    for task in [env.task("train", index, 9) for index in range(12)] + env.heldout(4):
        solution = solve(parse(task.data["level"]))
        assert solution, render(parse(task.data["level"]))
        step = await env.score(task, [" ".join(solution)])
        assert (step.reward, step.done, step.info["solved"]) == (1.0, True, 1.0)


@given(st.integers(0, 2**32), st.integers(3, 6), st.integers(1, 3), st.lists(st.sampled_from(sorted(DIRECTIONS))))
@settings(max_examples=100, deadline=None)
def test_moves_keep_the_rules(seed: int, side: int, boxes: int, moves: list[str]) -> None:
    level = generate(Random(seed), height=side, width=side, boxes=boxes, wall_fraction=0.2, pulls=5)
    if level is None:
        return
    assert parse(render(level)) == level
    for direction in moves:
        after = move(level, direction)
        assert len(after.boxes) == len(after.goals) == boxes
        assert not (after.boxes & after.walls)
        assert after.player not in after.boxes | after.walls
        assert after.walls == level.walls
        assert after.goals == level.goals
        level = after


def test_levels_are_not_given_away_and_splits_are_disjoint() -> None:
    env = make("sokoban", {"height": 3, "width": 3, "wall_fraction": 0, "pulls": 2})
    heldout = {task.data["level"] for task in env.heldout(50)}
    assert heldout.isdisjoint(env.task("train", i, 0).data["level"] for i in range(300))
    assert not any("*" in level for level in heldout)
    assert env.task("train", 5, 1) == env.fresh().task("train", 5, 1) != env.task("train", 5, 2)


async def test_an_episode_turn_by_turn() -> None:
    env = make("sokoban", {"max_turns": 4, "moves_per_turn": 2})
    opening = await env.reset(Task(env="s", id="1", seed=0, data={"level": "######\n#@-$.#\n######"}))
    assert "one to 2" in opening.messages[0].content
    assert "#@-$.#" in opening.messages[0].content
    confused = await env.step("What a game!")
    assert confused.observation.startswith("There is no move")
    assert not confused.done
    blocked = await env.step("up")
    assert blocked.observation.startswith("You cannot go up there.")
    assert "#@-$.#" in blocked.observation
    walked = await env.step("First I think: left?\nright")
    assert "#-@$.#" in walked.observation
    assert walked.reward == 0
    solved = await env.step("right, right, right")
    assert (solved.reward, solved.done, solved.observation) == (1.0, True, "")
    assert solved.info == {"solved": 1.0, "boxes_on_goals": 1.0, "turns": 4.0, "invalid_actions": 1.0}
    with pytest.raises(TaskError, match="outside an episode"):
        await env.step("right")


async def test_the_turn_limit_ends_the_episode_without_reward() -> None:
    env = make("sokoban", {"max_turns": 2})
    step = await env.score(Task(env="s", id="1", seed=0, data={"level": CORRIDOR}), ["up", "left"])
    assert (step.reward, step.done) == (0.0, True)


@pytest.mark.parametrize(
    ("action", "moves"),
    [
        ("<answer>Up, DOWN</answer> then left", ["up", "down"]),
        ("up\nleft left", ["left", "left"]),
        ("upward", []),
        ("", []),
    ],
)
def test_read_moves(action: str, moves: list[str]) -> None:
    assert read_moves(action) == moves


@pytest.mark.parametrize(
    "level", [None, "", "#", CORRIDOR.replace("@", "-"), CORRIDOR.replace(".", "$"), CORRIDOR.replace("#", "-"),
              CORRIDOR + "#", CORRIDOR.replace("@", "x"), "\n".join(["#" * 40] * 40), 7]
)  # fmt: skip
async def test_a_task_without_a_level_is_refused(level: object) -> None:
    with pytest.raises(TaskError, match="holds no level"):
        await make("sokoban").reset(Task(env="s", id="1", seed=0, data={"level": level}))


def test_settings_without_room_say_so() -> None:
    with pytest.raises(TaskError, match="found no level"):
        make("sokoban", {"height": 3, "width": 3, "boxes": 8}).task("train", 0, 0)
