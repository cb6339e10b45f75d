"""Tasks of WebArena's and WebVoyager's files on servers of the user's own, or on the web, in the real browser.

    [envs.arena]
    type = "web_hosted"
    settings = { file = "test.json", sites = { shopping = "http://127.0.0.1:7770", reddit = "http://127.0.0.1:9999" } }

Responsibilities: which task is asked when, its episode, and its judgement by what the file says, or by a judge
(`envs/judged`) where the file only says it in words.

Invariants: pages reach the hosts of the tasks and no others; a page or a judge that fails makes an episode void.

Not covered: servers are not reset between episodes, so a task that changes one changes it for the next, and a reward
cannot be computed again from the acts alone; nobody is logged in; WebVoyager's judge sees pictures, this one the page's
text.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from shoal.envs.base import (
    Environment,
    EnvironmentSettings,
    Observation,
    Split,
    Step,
    check_cursor,
    parse_settings,
    stable_fraction,
    stable_int,
)
from shoal.envs.judged import JudgedSettings, judged
from shoal.envs.web.actions import ActionError, Scroll, Stop, read_action
from shoal.envs.web.browser import borrowed_tab, require_browser
from shoal.envs.web.hosted_tasks import Hosted, HostedTask, PageCheck, holds, hosts, is_at, read_hosted
from shoal.envs.web.reading import Constrain, Reading, opening
from shoal.envs.web.tree import Page
from shoal.errors import RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task

if TYPE_CHECKING:
    from shoal.envs.web.tab import Tab

WHOLE = "() => document.documentElement.outerHTML"
DONE_RUBRIC = "A web agent was given the task. Does its answer, and the page where it stopped, show that it is done?"
MEANS_RUBRIC = "Does the reply answer the question, and mean the same as the reference answer?"


class HostedSettings(EnvironmentSettings):
    """Which file, where its sites are, and how pages are shown."""

    file: str = Field(min_length=1)
    """A task file of WebArena (JSON) or WebVoyager (JSON Lines)."""
    sites: dict[str, str] = {}
    """WebArena's names of sites and the addresses where they are."""
    allow: tuple[str, ...] = ()
    """Further hosts that pages may reach: `*.example.org`, `127.0.0.1:8000`."""
    judge: dict[str, Any] = {}
    """An OpenAI-compatible endpoint that says yes or no where the file only says it in words: `base_url` and `model`,
    as the environment `judged` takes them. Tasks that need one are left out where there is none."""
    budget_tokens: int = Field(default=1536, ge=64, le=32_768)
    """About how many tokens an observation may have."""
    max_steps: int = Field(default=30, ge=1, le=200)
    constrain: Constrain = "form"
    """As the environment `web` has it."""
    heldout_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of the tasks that is never trained on."""


class HostedWeb(Environment):
    """One task on somebody's servers."""

    Settings: ClassVar[type[EnvironmentSettings]] = HostedSettings
    settings: HostedSettings

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        """Raises: BrowserError where this machine has no browser, with the line that installs one."""
        super().__init__(settings, name=name)
        require_browser()
        given = {"tasks": "web_hosted", **self.settings.judge}
        self._judge = parse_settings(JudgedSettings, given, f"{self.name}.judge") if self.settings.judge else None
        self._stack = AsyncExitStack()
        self._tab: Tab | None = None
        self._task: HostedTask | None = None
        self._reading = Reading(self.settings.budget_tokens, self.settings.constrain)
        self._steps = self._invalid = 0

    @cached_property
    def hosted(self) -> Hosted:
        """What the file holds; raises `TaskError` where it holds nothing."""
        return read_hosted(Path(self.settings.file), self.settings.sites, judge=self._judge is not None)

    @cached_property
    def _sides(self) -> dict[Split, list[HostedTask]]:
        held = [one for one in self.hosted.tasks if stable_fraction("hosted", one.id) < self.settings.heldout_fraction]
        rest = [one for one in self.hosted.tasks if one not in held]
        return {"train": rest, "heldout": held}

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        side = self._sides[split]
        if not side:
            raise TaskError(f"{self.settings.file} leaves no task on the {split} side.", "Change heldout_fraction.")
        place = index if split == "heldout" else stable_int("hosted", seed, index)
        return Task(env=self.name, id=side[place % len(side)].id, seed=0)

    async def reset(self, task: Task) -> Observation:
        await self.close()
        found = next((one for one in self.hosted.tasks if one.id == task.id), None)
        if found is None:
            raise TaskError(f"{self.settings.file} has no task {task.id}.")
        reach = tuple(dict.fromkeys([*hosts(self.hosted.tasks, self.settings.sites), *self.settings.allow]))
        tab = await self._stack.enter_async_context(borrowed_tab(allowed=reach))
        self._tab, self._task, self._steps, self._invalid = tab, found, 0, 0
        self._reading = Reading(self.settings.budget_tokens, self.settings.constrain)
        await tab.begin(found.start)
        page = await tab.observe()
        content = opening(found.instruction, self._reading.show(page))
        return Observation((Message(role="user", content=content),), self._reading.grammar(page))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        tab, task = self._tab, self._task
        if tab is None or task is None or tab.page is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        self._steps += 1
        page, remark, answer, over = tab.page, "", "", False
        try:
            acted = read_action(action)
            over = isinstance(acted, Stop)
            answer = acted.answer if isinstance(acted, Stop) else ""
            await tab.act(acted)
            if isinstance(acted, Scroll):
                self._reading.scroll(acted)
        except ActionError as error:
            self._invalid += 1
            remark = f"{error}\n"
        if over or self._steps >= self.settings.max_steps:
            reward = float(await self._succeeded(tab, task, answer))
            await self.close()
            return Step("", reward, True, self._info(reward))
        now = await tab.observe()
        if now.url != page.url:
            self._reading.turn()
        return Step(remark + self._reading.show(now), 0.0, False, self._info(0.0), self._reading.grammar(now))

    async def _succeeded(self, tab: Tab, task: HostedTask, answer: str) -> bool:
        """All that the file asks for, what costs least first."""
        page = await tab.observe()
        if task.answer is not None and not holds(task.answer, answer):
            return False
        if not is_at(page.url, task.urls):
            return False
        for check in task.pages:
            if not holds(check.words, await self._text(tab, check)):
                return False
        return await self._judged(task, page, answer)

    async def _text(self, tab: Tab, check: PageCheck) -> str:
        """What a page says where the check looks."""
        if check.url and tab.url != check.url:
            await tab.goto(check.url)
        # The task file's own code, which the user chose to run.
        found = await tab.evaluate(f"() => {check.locator}" if check.locator else WHOLE)
        return "" if found is None else str(found)

    async def _judged(self, task: HostedTask, page: Page, answer: str) -> bool:
        if self._judge is None:
            return True
        for reference in task.answer.like if task.answer is not None else ():
            asked = f"{task.instruction}\nReference answer: {reference}"
            if await judged(self._judge.model_copy(update={"rubric": MEANS_RUBRIC}), asked, answer) != "yes":
                return False
        if not task.judged:
            return True
        reply = f"Answer: {answer}\nThe page where it stopped:\n{page.text()}"[: self._judge.reply_chars]
        return await judged(self._judge.model_copy(update={"rubric": DONE_RUBRIC}), task.instruction, reply) == "yes"

    def _info(self, reward: float) -> dict[str, float]:
        return {
            "strict": reward,
            "lenient": reward,
            "steps": float(self._steps),
            "invalid_actions": float(self._invalid),
        }

    async def judge(self, episode: Episode) -> Step:
        """The servers have gone on since: a worker is taken at its word, if its mark is one that there is."""
        if episode.reward not in (0.0, 1.0) or not 1 <= len(episode.turns) <= self.settings.max_steps:
            raise RecordError(f"an episode of task {episode.task.id} claims what no episode can be.")
        return Step("", episode.reward, True, dict(episode.reward_parts))

    async def close(self) -> None:
        self._tab = self._task = None
        await self._stack.aclose()
