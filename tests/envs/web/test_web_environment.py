"""The environment on a real browser: tasks, observations, rewards, replay, and faults."""

from __future__ import annotations

import pytest

from shoal.envs.base import Step
from shoal.envs.registry import make
from shoal.envs.web.actions import Stop, write_action
from shoal.envs.web.browser import BrowserError, the_browser
from shoal.envs.web.environment import Web, WebSettings
from shoal.errors import TaskError
from shoal.protocol.episode import Task


async def solve(env: Web, task: Task) -> tuple[Step, list[str]]:
    """An episode by the reference policy."""
    await env.reset(task)
    play = env.play
    policy = play.policy()
    assert policy is not None
    acts, step = [], None
    action = next(policy, None)
    while step is None or not step.done:
        acts.append(write_action(action or Stop()))
        step = await env.step(acts[-1])
        try:
            action = None if step.done or action is None else policy.send(play.page)
        except StopIteration:
            action = None
    return step, acts


def test_splits_are_disjoint_and_hold_a_site_back() -> None:
    settings = WebSettings()
    train, heldout = settings.split()
    assert train and heldout and not set(train) & set(heldout)
    assert not any(kind.startswith("wiki/") for kind in train)
    assert {kind.partition("/")[0] for kind in heldout} > {"wiki"}
    for side in ("site", "template"):
        assert WebSettings(heldout=side).split()[0] == train
    assert sorted(WebSettings(heldout="site").split()[1] + WebSettings(heldout="template").split()[1]) == sorted(
        heldout
    )
    with pytest.raises(TaskError, match="no task to train on"):
        WebSettings(worlds=("wiki",)).split()
    with pytest.raises(TaskError, match="shop/nothing"):
        WebSettings(tasks=("shop/nothing",)).split()


def test_without_a_browser_there_is_the_line_that_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CHROMIUM", "")
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BrowserError, match=r"pip install 'shoal\[web\]'"):
        make("web")
    monkeypatch.setenv("SHOAL_CHROMIUM", "/nowhere/chromium")
    with pytest.raises(BrowserError, match="SHOAL_CHROMIUM"):
        make("web")


@pytest.mark.usefixtures("chromium")
async def test_a_task_of_a_site_is_solved_and_scored_again() -> None:
    env = make("web", {"constrain": "seen"}, name="web")
    assert isinstance(env, Web)
    task = Task(env="web", id="shop/check_out/8", seed=8)
    opening = await env.reset(task)
    assert "http://shop.test/" in opening.messages[0].content
    assert opening.grammar is not None and "go_back" in opening.grammar.text
    step, acts = await solve(env, task)
    assert (step.reward, step.done, step.info["strict"]) == (1.0, True, 1.0)
    again = await env.score(task, acts)
    assert (again.reward, again.info) == (step.reward, step.info)
    assert (await env.score(task, [*acts[:-3], acts[-2], "stop []"])).reward == 0.0


@pytest.mark.usefixtures("chromium")
async def test_a_page_of_miniwob_is_seeded_and_rewards_what_it_asks() -> None:
    env = make("web", {"worlds": ["miniwob"], "heldout": "instance"}, name="web")
    assert isinstance(env, Web)
    task = Task(env="web", id="miniwob/click-checkboxes/5", seed=5)
    first = (await env.reset(task)).messages
    step, acts = await solve(env, task)
    assert step.reward == 1.0
    other = Task(env="web", id="miniwob/click-checkboxes/7", seed=7)
    assert (await env.reset(other)).messages != first
    assert (await env.score(other, [acts[-1]])).reward == 0.0
    # In the same tab, after other episodes, the task is what it was, down to the elements' ids.
    assert (await env.reset(task)).messages == first
    await env.close()


@pytest.mark.usefixtures("chromium")
async def test_what_cannot_be_done_is_an_observation_and_costs_a_step() -> None:
    env = make("web", {"max_steps": 7, "budget_tokens": 120}, name="web")
    await env.reset(Task(env="web", id="admin/role_of/2", seed=2))
    told = [await env.step(act) for act in ("hello", "click [99999]", "go_back", "scroll [down]", "scroll [up]")]
    for step, words in zip(
        told, ("no action", "no element", "no page to go back", "lines above", "lines below"), strict=True
    ):
        assert words in step.observation and not step.done
    assert told[-1].info["invalid_actions"] == 3.0
    assert not (await env.step("scroll [down]")).done
    last = await env.step("go_back")
    assert last.done and last.reward == 0.0 and last.info["steps"] == 7.0
    with pytest.raises(TaskError, match="Call reset first"):
        await env.step("go_back")


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
async def test_a_browser_that_is_killed_is_a_fault_and_the_next_episode_has_another() -> None:
    env = make("web", name="web")
    assert isinstance(env, Web)
    task = Task(env="web", id="shop/price_of/4", seed=4)
    await env.reset(task)
    launches = the_browser().num_launches
    chromium = the_browser()._chromium
    assert chromium is not None
    await the_browser().run(chromium.close())
    with pytest.raises(BrowserError):
        await env.step("click [5]")
    await env.close()
    step, _ = await solve(env, task)
    assert step.reward == 1.0 and the_browser().num_launches == launches + 1
