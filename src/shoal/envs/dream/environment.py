"""Web tasks in a dream: the pages after the first come from a world model, some rollouts are an expert's real ones.

    a page that was really collected ─▶ act ─▶ world model ─▶ page ─▶ … at most five acts, or `stop` ─▶ 0 or 1
    the same page, and what the expert really did from there ─▶ 1            (a share p of the rollouts)

1. DynaWeb judges every dream by its model. Here a task that asks for an answer is judged by its checker, which knows
   the answer; the model's own yes or no judges the others.
2. Whether a rollout is an expert's is drawn for each with probability p, so a group can hold none, or nothing else.

What is held out is played on real pages, so that a run's evaluations, before and after, say whether dreaming helped.

Invariants: nothing is trained on but what was collected of the training split; an expert's acts are those in the data,
to the letter; a world model that fails makes an episode void.
"""

from __future__ import annotations

import asyncio
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from shoal.envs.dream.collect import Collected
from shoal.envs.dream.dataset import read_episodes, read_or_none, task_kind, told_acts
from shoal.envs.dream.dreaming import Dream
from shoal.envs.dream.world import World, open_world
from shoal.envs.web.actions import Action, ActionError, Click, Scroll, Select, Stop, Type, read_action
from shoal.envs.web.environment import Web, WebSettings
from shoal.envs.web.reading import Reading, opening
from shoal.envs.web.sites.template import Instance, same
from shoal.envs.web.sites.templates import TEMPLATES
from shoal.envs.web.tree import Page
from shoal.errors import RecordError, TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Grammar

AT = "#"
"""Parts an episode's id from the number of the page that a dream begins with."""


class DreamSettings(EnvironmentSettings):
    """Where dreams begin, who dreams, and how much of a group is real."""

    data: tuple[str, ...] = Field(min_length=1)
    """Folders of `shoal dream collect --policy reference`: where dreams begin, and what experts do."""
    world: str = Field(min_length=1)
    """The world model: a folder of `shoal dream fit`, the address of a server of it (`http://…/v1`), any model's name,
    or `copy` for pages that never change."""
    expert_share: float = Field(default=0.5, ge=0, le=1)
    """p: each rollout is the expert's real one with this probability."""
    max_dream_steps: int = Field(default=5, ge=1, le=100)
    """Acts after which a dream is judged."""
    start: Literal["first", "any"] = "any"
    """Begin with an episode's first page, or with any page: with one from which the expert needs no more acts than a
    dream has."""
    world_tokens: int = Field(default=512, ge=16, le=8192)
    """Longest answer of the world model."""
    world_threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the world model, where it runs in the worker."""
    web: dict[str, Any] = {}
    """Settings of the environment `web`: how pages are shown, in dreams as well, and what is really played to
    evaluate."""


@lru_cache(maxsize=4)
def experts(folders: tuple[str, ...]) -> dict[str, Collected]:
    """What reference policies did well in training tasks, by id; read once in a process.

    Raises:
        StorageError, TaskError: there is nothing.
    """
    found = read_episodes(Path(folder) for folder in folders)
    good = {one.id: one for one in found if one.split == "train" and one.policy == "reference" and one.reward == 1.0}
    if not good:
        raise TaskError(
            "the collected episodes hold no success of a reference policy on a training task.",
            "Collect some: shoal dream collect --out FOLDER --policy reference.",
        )
    return good


class DreamEnvironment(Environment):
    """One task, dreamt; or, where it is held out, played on real pages."""

    Settings: ClassVar[type[EnvironmentSettings]] = DreamSettings
    gives: ClassVar[bool] = True
    settings: DreamSettings

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        super().__init__(settings, name=name)
        self._web_settings = parse_settings(WebSettings, self.settings.web, f"{self.name}.web")
        self._real: Web | None = None
        self._episode: Collected | None = None
        self._dream: Dream | None = None
        self._reading = Reading(self._web_settings.budget_tokens, self._web_settings.constrain)
        self._at = self._steps = self._invalid = 0

    @property
    def _experts(self) -> dict[str, Collected]:
        return experts(self.settings.data)

    @cached_property
    def _starts(self) -> list[tuple[str, int]]:
        """Episode and place of each page that a dream can begin with.

        Raises:
            StorageError, TaskError: there is none.
        """
        found = [start for one in self._experts.values() for start in self._starts_of(one)]
        if not found:
            raise TaskError(
                f"no collected episode is done within max_dream_steps = {self.settings.max_dream_steps} acts.",
                "Raise max_dream_steps.",
            )
        return found

    def _starts_of(self, episode: Collected) -> list[tuple[str, int]]:
        first = max(0, len(episode.moments) - self.settings.max_dream_steps)
        places = range(first, len(episode.moments)) if self.settings.start == "any" else range(int(first == 0))
        return [(episode.id, place) for place in places]

    def task(self, split: Split, index: int, seed: int) -> Task:
        if split == "heldout":
            return self._web().task(split, index, seed)
        check_cursor(index)
        id_, place = self._starts[stable_int("dream", seed, index) % len(self._starts)]
        return Task(env=self.name, id=f"{id_}{AT}{place}", seed=self._experts[id_].task.seed)

    def _web(self) -> Web:
        return Web(self._web_settings, name=self.name)

    async def reset(self, task: Task) -> Observation:
        await self.close()
        if AT not in task.id:
            self._real = self._web()
            return await self._real.reset(task)
        self._episode, self._at = self._find(task)
        self._steps = self._invalid = 0
        self._reading = Reading(self._web_settings.budget_tokens, self._web_settings.constrain)
        page = self._episode.moments[self._at].page
        self._dream = None
        if stable_fraction("expert", self.rollout_seed) >= self.settings.expert_share:
            world = await asyncio.to_thread(self._world)
            past = self._episode.moments[: self._at + 1]
            behind = [one.page for one, then in pairwise(past) if one.page.url != then.page.url]
            told = told_acts(self._episode, self._at)
            self._dream = Dream(world, self._episode.instruction, page, told, behind)
        content = opening(self._episode.instruction, self._reading.show(page))
        given = self._given()
        return Observation((Message(role="user", content=content),), self._grammar(page, given), given)

    def _grammar(self, page: Page, given: str | None) -> Grammar | None:
        """What the next act must match; an expert, who sees all of a page, is free where its act is on what is not
        shown."""
        acted = None if given is None else read_or_none(given)
        hidden = isinstance(acted, Click | Type | Select) and acted.id not in self._reading.shown.ids
        return None if hidden else self._reading.grammar(page)

    def _world(self) -> World:
        settings = self.settings
        return open_world(settings.world, max_tokens=settings.world_tokens, threads=settings.world_threads)

    def _find(self, task: Task) -> tuple[Collected, int]:
        id_, _, place = task.id.rpartition(AT)
        episode = self._experts.get(id_)
        if episode is None or not place.isdecimal() or int(place) >= len(episode.moments):
            raise TaskError(
                f"{task.id} is no page that was collected.", "Give every machine of the run the same episodes."
            )
        return episode, int(place)

    def _given(self) -> str | None:
        """What the expert says next, in a rollout of the expert's."""
        if self._dream is not None or self._episode is None:
            return None
        return self._episode.moments[self._at].action

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        if self._real is not None:
            return await self._real.step(action, truncated=truncated)
        if self._episode is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        self._steps += 1
        return await self._dreamt(self._dream, action) if self._dream is not None else self._followed(self._episode)

    def _followed(self, episode: Collected) -> Step:
        """The expert's next page."""
        self._at += 1
        if self._at == len(episode.moments):
            return Step("", 1.0, True, self._info(1.0, checked=True))
        moment, before = episode.moments[self._at], episode.moments[self._at - 1]
        acted = read_or_none(before.action)
        shown, given = self._shown(moment.page, before.page, acted), self._given()
        return Step(shown, 0.0, False, self._info(0.0), self._grammar(moment.page, given), given)

    async def _dreamt(self, dream: Dream, action: str) -> Step:
        """The page that the world model expects, or its judgement."""
        remark, acted, before = "", None, dream.page
        try:
            acted = read_action(action)
            await dream.act(acted)
        except ActionError as error:
            self._invalid += 1
            remark = f"{error}\n"
        if isinstance(acted, Stop) or self._steps >= self.settings.max_dream_steps:
            assert self._episode is not None, "a dream is of an episode"
            wanted = _wanted(self._episode, self._web_settings.content)
            checked = wanted is not None
            right = _answers(acted, wanted) if wanted is not None else await dream.done()
            return Step("", float(right), True, self._info(float(right), checked=checked))
        shown = remark + self._shown(dream.page, before, None if remark else acted)
        return Step(shown, 0.0, False, self._info(0.0), self._reading.grammar(dream.page))

    def _shown(self, page: Page, before: Page, acted: Action | None) -> str:
        if isinstance(acted, Scroll):
            self._reading.scroll(acted)
        elif page.url != before.url:
            self._reading.turn()
        return self._reading.show(page)

    def _info(self, reward: float, *, checked: bool = False) -> dict[str, float]:
        return {
            "strict": reward,
            "lenient": reward,
            "steps": float(self._steps),
            "invalid_actions": float(self._invalid),
            "expert": float(self._dream is None),
            "checked": float(checked),
        }

    async def judge(self, episode: Episode) -> Step:
        """Real episodes are played again. A dream cannot be: what can be known of it is checked, and the world model's
        judgement is taken from the worker."""
        if AT not in episode.task.id:
            if any(turn.given for turn in episode.turns):
                raise RecordError(f"an episode of task {episode.task.id} has acts that nobody gave.")
            return await super().judge(episode)
        start, place = self._find(episode.task)
        acts = [turn.completion.text for turn in episode.turns]
        given = [turn.given for turn in episode.turns]
        reward = episode.reward
        if any(given):
            if not all(given) or acts != [moment.action for moment in start.moments[place:]]:
                raise RecordError(f"an episode of task {episode.task.id} is not what its expert did.")
            reward = 1.0
        else:
            wanted = _wanted(start, self._web_settings.content)
            if len(acts) > self.settings.max_dream_steps or reward not in (0.0, 1.0):
                raise RecordError(f"an episode of task {episode.task.id} claims what no dream can be.")
            if wanted is not None:
                reward = float(_answers(read_or_none(acts[-1]), wanted))
        return Step("", reward, True, {**episode.reward_parts, "strict": reward, "lenient": reward})

    async def close(self) -> None:
        real, self._real = self._real, None
        self._episode = self._dream = None
        if real is not None:
            await real.close()


def _wanted(episode: Collected, content: int | None) -> str | None:
    """The answer that a task asks for; None where it asks for none, or only its page knows."""
    kind = task_kind(episode)
    return Instance(TEMPLATES[kind], episode.task.seed, content).wanted if kind in TEMPLATES else None


def _answers(acted: Action | None, wanted: str) -> bool:
    return isinstance(acted, Stop) and same(acted.answer, wanted)
