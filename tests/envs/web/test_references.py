"""The reference policies solve what they say they solve, on real pages."""

from __future__ import annotations

import asyncio

import pytest

from shoal.envs.web.actions import Stop
from shoal.envs.web.miniwob import EXCLUDED, TASKS
from shoal.envs.web.miniwob_reference import SOLVERS
from shoal.envs.web.play import Play
from shoal.envs.web.sites.templates import TEMPLATES

SITE_SEEDS = range(4)
MINIWOB_SEEDS = range(100, 103)


async def play(kind: str, seed: int) -> float:
    one = await Play.begin(kind, seed)
    try:
        policy = one.policy()
        assert policy is not None
        action = next(policy, None)
        for _ in range(60):
            await one.act(action or Stop())
            if one.done:
                break
            try:
                action = None if action is None else policy.send(one.page)
            except StopIteration:
                action = None
        return one.reward
    finally:
        await one.close()


def test_every_task_has_its_place_and_no_task_two() -> None:
    left_out = [task for tasks in EXCLUDED.values() for task in tasks.split()]
    assert len(set(left_out)) == len(left_out) and not set(left_out) & set(TASKS)
    assert len(set(TASKS)) == len(TASKS) and set(SOLVERS) <= set(TASKS) and len(SOLVERS) >= 20


@pytest.mark.usefixtures("chromium")
async def test_some_of_them() -> None:
    kinds = ("forum/reply", "miniwob/choose-list")
    assert await asyncio.gather(*(play(kind, 1) for kind in kinds)) == [1.0] * len(kinds)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("chromium")
@pytest.mark.parametrize("site", sorted({kind.partition("/")[0] for kind in TEMPLATES}))
async def test_all_templates_of_a_site(site: str) -> None:
    work = [(kind, seed) for kind in TEMPLATES if kind.startswith(f"{site}/") for seed in SITE_SEEDS]
    assert await _failed(work) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("chromium")
async def test_all_pages_of_miniwob() -> None:
    assert await _failed([(f"miniwob/{task}", seed) for task in SOLVERS for seed in MINIWOB_SEEDS]) == []


async def _failed(work: list[tuple[str, int]]) -> list[tuple[str, int]]:
    todo, failed = iter(work), []

    async def player() -> None:
        for kind, seed in todo:
            if await play(kind, seed) != 1.0:
                failed.append((kind, seed))

    await asyncio.gather(*(player() for _ in range(3)))
    return failed
