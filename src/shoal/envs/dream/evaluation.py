"""How well a world model foresees real pages: after one act, and deeper and deeper in a dream.

Depth d of a dream: the real acts of an episode, one after another, from its first page on, each on the page that was
dreamt before; the page after d acts is compared with the real one, its change with the real change since the first.

Invariants: the same pages are asked of every world that is compared; nothing but `Match`es is averaged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any, TypeVar

from shoal.envs.base import stable_int
from shoal.envs.dream.collect import Collected
from shoal.envs.dream.dataset import Move, moves, read_or_none, told_acts
from shoal.envs.dream.dreaming import Dream
from shoal.envs.dream.score import Match, compare, mean
from shoal.envs.dream.world import Prediction, World
from shoal.envs.web.actions import ActionError, Stop
from shoal.errors import ShoalError

AT_ONCE = 16
"""Questions under way."""

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]


async def _each(items: Sequence[T], do: Callable[[T], Awaitable[R]], progress: Progress) -> list[R]:
    """`do` for each, `AT_ONCE` at a time, in order; raises the first error of one."""
    results: dict[int, R] = {}
    todo = iter(enumerate(items))

    async def worker() -> None:
        for number, item in todo:
            results[number] = await do(item)
            progress(len(results), len(items))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(items))):
                group.create_task(worker())
    except* ShoalError as errors:
        raise errors.exceptions[0] from None
    return [results[number] for number in range(len(items))]


def sample(episodes: Iterable[Collected], limit: int, seed: int = 0) -> list[Move]:
    """Transitions that change the page, drawn evenly; at most `limit`."""
    found = [move for episode in episodes for move in moves(episode) if move.changed]
    if len(found) > limit:
        found = Random(stable_int("eval moves", seed)).sample(found, limit)
    return found


async def one_act(
    world: World, asked: Sequence[Move], progress: Progress = lambda *_: None
) -> list[tuple[Prediction, Match]]:
    """Predictions for single transitions, and how good each is."""

    async def predict(move: Move) -> tuple[Prediction, Match]:
        came = await world.next(move.instruction, move.before, move.action, move.back)
        return came, compare(move.before, move.after, came.page)

    return await _each(asked, predict, progress)


def by_action(asked: Sequence[Move], matches: Sequence[Match]) -> dict[str, dict[str, float]]:
    """Means for each kind of act, and how many there were."""
    kinds: dict[str, list[Match]] = {}
    for move, match in zip(asked, matches, strict=True):
        kinds.setdefault(type(move.action).__name__.lower(), []).append(match)
    return {kind: {**mean(rows), "transitions": float(len(rows))} for kind, rows in sorted(kinds.items())}


async def depth_curve(
    world: World, episodes: Sequence[Collected], deepest: int, progress: Progress = lambda *_: None
) -> list[dict[str, float]]:
    """For depths 1 … `deepest`: exact and edit F1, and the same for the first page left as it is."""

    async def dream(episode: Collected) -> list[tuple[Match, Match]]:
        first = episode.moments[0].page
        going = Dream(world, episode.instruction, first)
        found = []
        for moment, following in zip(episode.moments[:deepest], episode.moments[1:], strict=False):
            action = read_or_none(moment.action)
            if isinstance(action, Stop):
                break
            if action is not None:
                # On a page that was dreamt wrongly, the real act may not be there to be done.
                with suppress(ActionError):
                    await going.act(action)
            found.append((compare(first, following.page, going.page), compare(first, following.page, first)))
        return found

    rows = await _each(episodes, dream, progress)
    curve = []
    for depth in range(1, deepest + 1):
        there = [row[depth - 1] for row in rows if len(row) >= depth]
        if there:
            own, copied = mean(one for one, _ in there), mean(other for _, other in there)
            curve.append(
                {
                    "depth": float(depth),
                    "dreams": float(len(there)),
                    **own,
                    "copy_exact": copied["exact"],
                    "copy_edit_f1": copied["edit_f1"],
                }
            )
    return curve


async def judging(
    world: World, episodes: Sequence[Collected], progress: Progress = lambda *_: None
) -> Mapping[str, float]:
    """How often the world model's own judgement of real episodes agrees with the sites' checkers."""

    async def judge(episode: Collected) -> tuple[bool, bool]:
        said = await world.done(episode.instruction, told_acts(episode), episode.moments[-1].page)
        return said, episode.reward == 1.0

    rows = await _each(episodes, judge, progress)
    right = [said for said, real in rows if real]
    wrong = [said for said, real in rows if not real]
    found: dict[str, float] = {"episodes": float(len(rows))}
    if rows:
        found["agreement"] = sum(said == real for said, real in rows) / len(rows)
    if right:
        found["yes_where_done"] = sum(right) / len(right)
    if wrong:
        found["yes_where_not_done"] = sum(wrong) / len(wrong)
    return found


def summary(matches: Sequence[Match]) -> dict[str, Any]:
    """How many transitions, and their means."""
    return {"transitions": len(matches), **mean(matches)}
