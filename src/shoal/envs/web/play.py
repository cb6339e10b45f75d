"""One task being played: a page of MiniWoB++ or a site of ours in a tab, from its first page to its judgement.

Invariant: what an act leads to depends on the task and the acts before it alone. A fault of the browser is a
`BrowserError`, after which nothing but `close` makes sense.
"""

from __future__ import annotations

from typing import Any

from shoal.envs.web import miniwob
from shoal.envs.web.actions import Action, Stop
from shoal.envs.web.browser import BrowserError, Lent, require_browser, the_browser
from shoal.envs.web.policy import Policy
from shoal.envs.web.sites.template import Instance
from shoal.envs.web.sites.templates import TEMPLATES
from shoal.envs.web.tree import Page
from shoal.errors import TaskError

MINIWOB = "miniwob"


def all_tasks() -> dict[str, int]:
    """Every kind of task there is: its id (`world/name`), and its level."""
    found = {f"{MINIWOB}/{name}": 1 for name in miniwob.TASKS}
    return found | {name: template.level for name, template in TEMPLATES.items()}


class Play:
    """One episode; `await begin(...)` makes it, and `close` must follow."""

    def __init__(self, kind: str, lent: Lent) -> None:
        self.kind = kind
        self.instruction = ""
        self.done = False
        self.reward = 0.0
        """From 0 to 1, once it is done."""
        self._lent = lent
        self._instance: Instance[Any] | None = None
        self._broken = False

    @classmethod
    async def begin(cls, kind: str, seed: int, content: int | None = None) -> Play:
        """Show the first page of task `kind`'s instance `seed`, on a site that is about `content` (see `Site`).

        Raises:
            TaskError: there is no such task.
            BrowserError: the browser fails, or there is none.
        """
        world, _, name = kind.partition("/")
        if kind not in TEMPLATES and (world != MINIWOB or name not in miniwob.TASKS):
            raise TaskError(f"there is no task {kind!r} on the web.", "Its tasks are listed in docs/web.md.")
        require_browser()
        browser = the_browser()
        instance = Instance(TEMPLATES[kind], seed, content) if kind in TEMPLATES else None
        sites = {miniwob.HOST: miniwob.pages()} if instance is None else {instance.site.host: instance.site}
        play = cls(kind, await browser.run(browser.take(kind if instance is None else "", sites)))
        try:
            if instance is None:
                await miniwob.load(play._lent.tab, name)
                play.instruction = await miniwob.reset(play._lent.tab, seed)
            else:
                play._instance, play.instruction = instance, instance.instruction
                play._lent.tab.hidden_ids = frozenset()
                await play._lent.tab.begin(instance.site.start)
            await play._lent.tab.observe()
        except BaseException:
            play._broken = True
            await play.close()
            raise
        return play

    @property
    def page(self) -> Page:
        """The page as it was read last."""
        page = self._lent.tab.page
        assert page is not None, "begin reads it"
        return page

    async def act(self, action: Action) -> None:
        """Do one action; `done` and `reward` say what came of it.

        Raises:
            ActionError: it cannot be done; the page is as it was.
            BrowserError: the browser failed.
        """
        if isinstance(action, Stop):
            await self.finish(action.answer)
            return
        try:
            await self._lent.tab.act(action)
            if self._instance is None:
                outcome = await miniwob.outcome(self._lent.tab)
                if outcome.done:
                    self.done, self.reward = True, max(0.0, min(1.0, outcome.reward))
                    return
            await self._lent.tab.observe()
        except BrowserError:
            self._broken = True
            raise

    async def finish(self, answer: str = "") -> None:
        """End it here; a site is judged by its state and the answer, a page of MiniWoB++ has not been solved."""
        self.done = True
        self.reward = float(self._instance.succeeded(answer)) if self._instance is not None else 0.0

    def policy(self) -> Policy | None:
        """The reference policy from the first page on, where there is one."""
        if self._instance is not None:
            return self._instance.policy(self.page)
        from shoal.envs.web.miniwob_reference import SOLVERS

        maker = SOLVERS.get(self.kind.partition("/")[2])
        return None if maker is None else maker(self.instruction, self.page)

    async def screenshot(self) -> bytes:
        """The page as a PNG file."""
        return await self._lent.tab.screenshot()

    async def close(self) -> None:
        """Give the tab back."""
        browser = the_browser()
        await browser.run(browser.give(self._lent, broken=self._broken))
