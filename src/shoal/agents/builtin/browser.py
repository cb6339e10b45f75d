"""A browser for agents: pages as trees with numbered elements, and acts on them. Each run has its own.

Invariants: pages reach only the hosts that the user allowed (`envs/web/gate`); what one run's pages store, no other run
sees; no more than `MAX_TABS` are open, and none that was not used for `IDLE_S`; a browser that crashed is started anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from shoal.agents.tools.caller import CALLER
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.envs.web.actions import Action, ActionError, Click, GoBack, Scroll, Select, Type
from shoal.envs.web.browser import BrowserError, borrowed_tab, require_browser
from shoal.envs.web.tree import window

if TYPE_CHECKING:
    from shoal.envs.web.tab import Tab

MAX_TABS = 8
IDLE_S = 900.0
PAGE_TOKENS = 1500
"""Of a page's tree that one answer shows."""

Id = Annotated[str, Field(max_length=16, description="the number in brackets before the element")]


class Seen(BaseModel):
    """The page after an act."""

    url: str
    title: str
    tree: str
    """Elements with their numbers; cut, with a mark, where it is long."""
    first_line: int
    lines: int
    """How many the whole tree has."""


@dataclass
class _Held:
    tab: Tab
    stack: AsyncExitStack
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used_s: float = 0.0


class Tabs:
    """The open tabs, by the runs that they belong to."""

    def __init__(self, allow: Sequence[str]) -> None:
        self._allow = tuple(allow)
        self._held: dict[str, _Held] = {}
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def mine(self) -> AsyncIterator[Tab]:
        """The calling run's tab, to itself for as long as the block lasts.

        Raises:
            ToolError: there is no browser, the act cannot be done, or the page is gone.
        """
        owner = CALLER.get()
        try:
            held = await self._open(owner)
            async with held.lock:
                held.used_s = time.monotonic()
                yield held.tab
        except ActionError as error:
            raise ToolError(f"{error.problem} {error.remedy}".strip()) from None
        except BrowserError as error:
            await self._close(owner)
            raise ToolError(f"{error.problem} Navigate again.", retryable=False) from None

    async def _open(self, owner: str) -> _Held:
        async with self._opening:
            now_s = time.monotonic()
            idle = [
                name for name, held in self._held.items() if now_s - held.used_s > IDLE_S and not held.lock.locked()
            ]
            for name in idle:
                await self._close(name)
            if (found := self._held.get(owner)) is not None:
                return found
            if len(self._held) >= MAX_TABS:
                free = [name for name, held in self._held.items() if not held.lock.locked()]
                if not free:
                    raise ToolError(f"{MAX_TABS} runs are using the browser", retryable=True)
                await self._close(min(free, key=lambda name: self._held[name].used_s))
            stack = AsyncExitStack()
            tab = await stack.enter_async_context(borrowed_tab(allowed=self._allow))
            made = self._held[owner] = _Held(tab, stack, used_s=now_s)
            return made

    async def _close(self, owner: str) -> None:
        if (held := self._held.pop(owner, None)) is not None:
            await held.stack.aclose()

    async def close(self) -> None:
        """Close all tabs."""
        for owner in list(self._held):
            await self._close(owner)


def browser_tools(allow: Sequence[str] = ()) -> Sequence[Callee]:
    """Tools that drive a browser.

    Args:
        allow: hosts that pages may reach: `example.org`, `*.example.org`, `127.0.0.1:8000`; none but these.

    Raises:
        BrowserError: there is no browser here, with the line that installs one.
    """
    require_browser()
    tabs = Tabs(allow)

    async def see(work: Callable[[Tab], Awaitable[None]], first_line: int = 0) -> Seen:
        async with tabs.mine() as tab:
            await work(tab)
            page = await tab.observe()
            shown = window(page, PAGE_TOKENS, first_line)
            refused = ", ".join(tab.gate.refused[:10])
            tree = f"{shown.text}\n(not reached, because not allowed: {refused})" if refused else shown.text
            return Seen(url=page.url, title=page.title, tree=tree, first_line=shown.start, lines=shown.total)

    async def acted(action: Action) -> Seen:
        return await see(lambda tab: tab.act(action))

    async def navigate(url: Annotated[str, Field(min_length=8, max_length=2000)]) -> Seen:
        """Go to a page; returns its elements with their numbers."""
        if not url.startswith(("http://", "https://")):
            raise ToolError("an address begins with http:// or https://")
        return await see(lambda tab: tab.goto(url))

    async def read_tree(first_line: Annotated[int, Field(ge=0, description="from 0")] = 0) -> Seen:
        """The page as it is now, from a line on: for long pages."""

        async def nothing(_: Tab) -> None:
            pass

        return await see(nothing, first_line)

    async def click(id: Id) -> Seen:
        """Click on an element."""
        return await acted(Click(id))

    async def type_text(id: Id, text: Annotated[str, Field(max_length=500)], enter: bool = False) -> Seen:
        """Replace what a field holds, and press Enter afterwards if asked."""
        return await acted(Type(id, text, enter))

    async def select_option(id: Id, option: Annotated[str, Field(max_length=500)]) -> Seen:
        """Choose an option of a list by its words."""
        return await acted(Select(id, option))

    async def scroll(direction: Literal["up", "down"]) -> Seen:
        """Scroll the page, for those that load more as they are scrolled."""
        return await acted(Scroll(direction))

    async def go_back() -> Seen:
        """Go back to the page before."""
        return await acted(GoBack())

    use = Use(max_concurrency=MAX_TABS, timeout_s=120)
    reading = Use(max_concurrency=MAX_TABS, timeout_s=120, idempotent=True)
    acts = (click, type_text, select_option, scroll, go_back)
    return [
        *(FunctionTool(one, reading) for one in (navigate, read_tree)),
        *(FunctionTool(one, use) for one in acts),
    ]
