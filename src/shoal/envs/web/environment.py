"""The web as an environment: read an instruction and a page's tree, act by one line, be judged by what became of it.

Responsibilities: which task is asked when, what is held out, and what an episode's acts lead to. Observations are cut
to a budget of tokens, and marked where they are cut; `scroll` moves to the part that is not shown (`reading`).

Invariants: held-out sites and templates are never trained on (with `heldout = "instance"` it is their seeds that are
not); an action that cannot be done is an observation that says why, and costs a step; a fault of the browser is an
exception, which makes the episode void.
"""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

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
from shoal.envs.web.actions import ActionError, Scroll, read_action
from shoal.envs.web.browser import require_browser
from shoal.envs.web.play import MINIWOB, Play, all_tasks
from shoal.envs.web.reading import Constrain, Reading, opening
from shoal.envs.web.sites.templates import SITES
from shoal.envs.web.tree import Window
from shoal.errors import TaskError
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task

WORLDS = (MINIWOB, *SITES)


class WebSettings(EnvironmentSettings):
    """Which tasks, how a page is shown, and what is held out."""

    worlds: tuple[str, ...] = SITES
    """`miniwob` and the sites of our own."""
    tasks: tuple[str, ...] = ()
    """Ids of tasks, such as `shop/put_one`; empty for all of the worlds."""
    levels: tuple[int, ...] = ()
    """1 to 3; empty for all."""
    budget_tokens: int = Field(default=384, ge=64, le=32_768)
    """About how many tokens an observation may have."""
    max_steps: int = Field(default=12, ge=1, le=100)
    constrain: Constrain = "no"
    """`form`: a grammar lets the agent write nothing but actions; `seen`: and name no element but those it is shown."""
    content: int | None = Field(default=None, ge=0)
    """Seed of what the sites are about, the same in every episode, as with a real site; absent: every episode has
    other products, threads and accounts."""
    heldout: Literal["both", "template", "site", "instance"] = "both"
    """What is never trained on: templates, a site, both of these; or, of every template, the seeds alone. Evaluation
    asks what is named here."""
    heldout_site: str = "wiki"
    heldout_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of the other sites' templates that is held out."""

    @field_validator("worlds")
    @classmethod
    def _known(cls, worlds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(worlds) - set(WORLDS):
            raise ValueError(f"there is no world {sorted(unknown)[0]!r}; there are {', '.join(WORLDS)}")
        return worlds

    def split(self) -> tuple[list[str], list[str]]:
        """Kinds of tasks to train on, and those that are held out.

        Raises:
            TaskError: nothing is left on one side, or a task is not known.
        """
        known = all_tasks()
        if unknown := set(self.tasks) - set(known):
            raise TaskError(
                f"there is no task {sorted(unknown)[0]!r} on the web.", "Its tasks are listed in docs/web.md."
            )
        chosen = [
            kind
            for kind, level in known.items()
            if (kind in self.tasks if self.tasks else kind.partition("/")[0] in self.worlds)
            and (not self.levels or level in self.levels)
        ]
        train, heldout = chosen, chosen
        if self.heldout != "instance":
            site = [kind for kind in chosen if kind.partition("/")[0] == self.heldout_site]
            rest = [kind for kind in chosen if kind not in site]
            template = [kind for kind in rest if stable_fraction("web", kind) < self.heldout_fraction]
            # A site and templates are kept from training whichever of them is asked for: runs can be compared.
            train = [kind for kind in rest if kind not in template]
            heldout = {"site": site, "template": template, "both": template + site}[self.heldout]
        if not train or not heldout:
            raise TaskError(
                "the settings of the web leave no task to train on, or none that is held out.",
                'Name more worlds, or set heldout = "instance".',
            )
        return train, heldout


class Web(Environment):
    """One task on a page or a site."""

    Settings: ClassVar[type[EnvironmentSettings]] = WebSettings
    settings: WebSettings
    _play: Play | None = None

    def __init__(self, settings: EnvironmentSettings | None = None, *, name: str = "") -> None:
        """Raises: BrowserError where this machine has no browser, with the line that installs one."""
        super().__init__(settings, name=name)
        require_browser()
        self._train, self._heldout = self.settings.split()
        self._steps = self._invalid = 0
        self._reading = self._new_reading()

    def _new_reading(self) -> Reading:
        return Reading(self.settings.budget_tokens, self.settings.constrain)

    @property
    def play(self) -> Play:
        """The episode that is going on, for those who watch it.

        Raises:
            TaskError: there is none.
        """
        if self._play is None:
            raise TaskError(f"environment {self.name!r} was asked to step outside an episode.", "Call reset first.")
        return self._play

    @property
    def shown(self) -> Window:
        """What the agent sees of the page now."""
        return self._reading.shown

    def task(self, split: Split, index: int, seed: int) -> Task:
        check_cursor(index)
        rng = Random(stable_int("web", split, seed, index))
        kind = self._heldout[index % len(self._heldout)] if split == "heldout" else rng.choice(self._train)
        # The last bit of an instance's seed is its side.
        instance = rng.getrandbits(40) * 2 + (split == "heldout")
        return Task(env=self.name, id=f"{kind}/{instance}", seed=instance)

    async def reset(self, task: Task) -> Observation:
        await self.close()
        play = self._play = await Play.begin(task.id.rpartition("/")[0], task.seed, self.settings.content)
        self._steps = self._invalid = 0
        self._reading = self._new_reading()
        content = opening(play.instruction, self._reading.show(play.page))
        return Observation((Message(role="user", content=content),), self._reading.grammar(play.page))

    async def step(self, action: str, *, truncated: bool = False) -> Step:
        play = self.play
        self._steps += 1
        remark = ""
        url = play.page.url
        try:
            read = read_action(action)
            await play.act(read)
            if isinstance(read, Scroll):
                self._reading.scroll(read)
            elif not play.done and play.page.url != url:
                self._reading.turn()
        except ActionError as error:
            self._invalid += 1
            remark = f"{error}\n"
        if not play.done and self._steps >= self.settings.max_steps:
            await play.finish()
        if not play.done:
            shown = self._reading.show(play.page)
            return Step(remark + shown, 0.0, False, self._info(0.0), self._reading.grammar(play.page))
        reward = play.reward
        await self.close()
        return Step("", reward, True, self._info(reward))

    def _info(self, reward: float) -> dict[str, Any]:
        return {
            "strict": float(reward == 1.0),
            "lenient": reward,
            "steps": float(self._steps),
            "invalid_actions": float(self._invalid),
        }

    async def close(self) -> None:
        play, self._play = self._play, None
        if play is not None:
            await play.close()
