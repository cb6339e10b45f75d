"""One page in a browser context of its own: go somewhere, read it, act on it.

1. Acts are real input events on the element (Chromium's own `Input` domain), not Playwright's: the same
   events, without its waiting, which costs a tenth of a second each.

Invariants: each public call ends within `ACT_S` (`LOAD_S` for going somewhere); it returns when what it caused is over:
no navigation, no request and no short timer of the page, and two frames drawn since. Faults of the browser are
`BrowserError`, acts that cannot be done are `ActionError`; ids are good until the next document.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from playwright.async_api import Error
from playwright.async_api import Page as Sheet

from shoal.envs.web.actions import Action, ActionError, Click, GoBack, Scroll, Select, Stop, Type, options_of, target
from shoal.envs.web.browser import VIEWPORT, BrowserError
from shoal.envs.web.gate import Gate
from shoal.envs.web.observation import Numbering, build_page, read_snapshot
from shoal.envs.web.tab_scripts import COUNT_TIMERS, EMPTY, POINT, QUIET, SELECT, SET_DATE
from shoal.envs.web.tree import Page

if TYPE_CHECKING:
    from playwright.async_api import Browser as Chromium
    from playwright.async_api import BrowserContext, CDPSession

    from shoal.envs.web.browser import Browser

ACT_S = 20.0
LOAD_S = 45.0
CLOSE_S = 5.0
SETTLE_S = 5.0
"""A page that is still busy after this long is read as it is."""
POLL_S = 0.004
MAX_KEYS = 40
"""Longer texts come at once, as if they were pasted."""

PICKED_ROLES = ("Date", "DateTime", "InputTime", "ColorWell", "slider")
"""Fields whose text cannot be typed over; their value is set, in the form that HTML gives it."""

P = ParamSpec("P")
T = TypeVar("T")


def _call(
    deadline_s: float,
) -> Callable[
    [Callable[Concatenate[Tab, P], Coroutine[Any, Any, T]]], Callable[Concatenate[Tab, P], Coroutine[Any, Any, T]]
]:
    """A public call: runs in the browser's loop, with a deadline, and with the browser's faults as `BrowserError`."""

    def decorate(
        method: Callable[Concatenate[Tab, P], Coroutine[Any, Any, T]],
    ) -> Callable[Concatenate[Tab, P], Coroutine[Any, Any, T]]:
        async def guarded(tab: Tab, *args: P.args, **kwargs: P.kwargs) -> T:
            if tab.crashed:
                raise BrowserError("The page crashed.", "Begin again in another tab.")
            try:
                async with asyncio.timeout(deadline_s):
                    return await method(tab, *args, **kwargs)
            except TimeoutError:
                raise BrowserError(f"The page did not answer within {deadline_s:.0f} s.", "Try again.") from None
            except Error as error:
                said = " ".join(error.message.split())[:200]
                raise BrowserError(f"The browser failed: {said}", "Begin again in another tab.") from None

        @wraps(method)
        async def called(tab: Tab, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return await tab.browser.run(guarded(tab, *args, **kwargs))

        return called

    return decorate


def _key_code(char: str) -> int:
    """Windows' number of the key; marks need none, and theirs would be those of other keys."""
    return ord(char.upper()) if char.isalnum() or char == " " else 0


class Tab:
    """One page; `browser.borrowed_tab` gives it."""

    def __init__(self, browser: Browser, context: BrowserContext, sheet: Sheet, cdp: CDPSession, gate: Gate) -> None:
        self.browser = browser
        self.gate = gate
        self.crashed = False
        self.page: Page | None = None
        """What `observe` read last; acts name its elements."""
        self.hidden_ids: frozenset[str] = frozenset()
        """Values of the attribute `id`: observations leave these elements out."""
        self._context = context
        self._sheet = sheet
        self._cdp = cdp
        self._numbering = Numbering()
        self._document = 0
        self._loading = False
        sheet.on("crash", lambda _: self._crash())
        sheet.on("popup", lambda popup: asyncio.ensure_future(self._follow(popup)))
        cdp.on("Page.frameStartedLoading", lambda event: self._load(event, True))
        cdp.on("Page.frameStoppedLoading", lambda event: self._load(event, False))
        self._frame = ""

    @classmethod
    async def open(cls, browser: Browser, chromium: Chromium, gate: Gate) -> Tab:
        """In the browser's loop: a context whose only proxy is `gate`."""
        context = await chromium.new_context(
            proxy={"server": f"http://127.0.0.1:{gate.port}"},
            viewport=VIEWPORT,  # type: ignore[arg-type]
            locale="en-GB",
            timezone_id="UTC",
            reduced_motion="reduce",
            service_workers="block",
            accept_downloads=False,
        )
        context.set_default_timeout(ACT_S * 1000)
        context.set_default_navigation_timeout(LOAD_S * 1000)
        await context.add_init_script(COUNT_TIMERS)
        sheet = await context.new_page()
        cdp = await context.new_cdp_session(sheet)
        tab = cls(browser, context, sheet, cdp, gate)
        await cdp.send("Page.enable")
        await cdp.send("Accessibility.enable")
        tab._frame = (await cdp.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
        return tab

    async def shut(self) -> None:
        """In the browser's loop: the context and all it stored go."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._context.close()
        except (Error, TimeoutError):
            self.crashed = True  # With a browser that has gone there is nothing left to close.

    def _crash(self) -> None:
        self.crashed = True

    def _load(self, event: dict[str, Any], loading: bool) -> None:
        if event.get("frameId") == self._frame:
            self._loading = loading

    async def _follow(self, popup: Sheet) -> None:
        """A window that the page opened becomes the page, if pages may go there: for us the browser opens files too."""
        try:
            await popup.wait_for_load_state("domcontentloaded")
            url = popup.url
            await popup.close()
            if url.startswith(("http://", "https://")):
                self._loading = True
                await self._sheet.goto(url)
        except Error:
            self._loading = False

    @property
    def url(self) -> str:
        """Where it is."""
        return self._sheet.url

    @_call(LOAD_S)
    async def goto(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""
        await self._sheet.goto(url, wait_until="load")
        await self._settle()

    @_call(LOAD_S)
    async def begin(self, url: str) -> None:
        """As `goto`, and there is no going back from there."""
        await self._sheet.goto(url, wait_until="load")
        await self._cdp.send("Page.resetNavigationHistory")
        await self._settle()

    @_call(LOAD_S)
    async def evaluate(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression or function in the page. For our own code: never for an agent's."""
        return await self._sheet.evaluate(script, argument)

    @_call(LOAD_S)
    async def settle(self) -> None:
        """Wait until nothing is loading any more."""
        await self._settle()

    @_call(ACT_S)
    async def screenshot(self) -> bytes:
        """The page as a PNG file."""
        return await self._sheet.screenshot(type="png")

    @_call(LOAD_S)
    async def observe(self) -> Page:
        """The page's tree; the elements that acts may name from now on."""
        for _ in range(3):
            try:
                self.page = await self._read()
                return self.page
            except Error:
                # It went on to another document while it was read.
                if self.crashed or not self.browser.is_running:
                    raise
                await self._settle()
        self.page = await self._read()
        return self.page

    async def _read(self) -> Page:
        ax, raw = await asyncio.gather(
            self._cdp.send("Accessibility.getFullAXTree"),
            self._cdp.send("DOMSnapshot.captureSnapshot", {"computedStyles": []}),
        )
        snapshot = read_snapshot(raw, self.hidden_ids)
        if snapshot.document != self._document:
            self._document, self._numbering = snapshot.document, Numbering()
        self._numbering.see(snapshot.elements)
        return build_page(self._sheet.url, ax["nodes"], self._numbering, snapshot)

    def renumber(self) -> None:
        """Give elements new ids, from 0, with the next `observe`: to those who begin, the page is a new one."""
        self._document = 0

    @_call(LOAD_S)
    async def act(self, action: Action) -> None:
        """Do one action on the page that was observed last, and wait for what follows from it.

        `stop` does nothing; `scroll` scrolls by three quarters of a screen.

        Raises:
            ActionError: it cannot be done, for the reason given; the page is as it was.
        """
        page = self.page
        if page is None:
            raise BrowserError("The page has not been read yet.", "Call observe first.")
        node = target(action, page)
        match action:
            case Click(id_):
                await self._click(id_)
            case Type(id_, text, enter):
                assert node is not None
                await self._type(id_, text, enter, picked=node.role in PICKED_ROLES)
            case Select(id_, option):
                assert node is not None
                if not options_of(node):
                    raise ActionError(f"[{id_}] is no list to select from.", "Click on it instead.")
                if not await self._on(id_, SELECT, option):
                    names = ", ".join(options_of(node)[:12])
                    raise ActionError(f"[{id_}] has no option {option[:60]!r}.", f"It has: {names}.")
            case Scroll(direction):
                step = VIEWPORT["height"] * 3 // 4 * (1 if direction == "down" else -1)
                await self._cdp.send("Runtime.evaluate", {"expression": f"scrollBy(0, {step})"})
            case GoBack():
                history = await self._cdp.send("Page.getNavigationHistory")
                index = history["currentIndex"]
                if index < 1 or history["entries"][index - 1]["url"] == "about:blank":
                    raise ActionError("There is no page to go back to.")
                await self._sheet.go_back(wait_until="load")
            case Stop():
                return
        await self._settle()

    async def _on(self, id_: str, function: str, *arguments: Any) -> Any:
        """Call a JavaScript function on an element."""
        found = await self._cdp.send("DOM.resolveNode", {"backendNodeId": self._backend(id_)})
        call = {
            "objectId": found["object"]["objectId"],
            "functionDeclaration": function,
            "arguments": [{"value": one} for one in arguments],
            "returnByValue": True,
        }
        answer = await self._cdp.send("Runtime.callFunctionOn", call)
        return answer["result"].get("value")

    def _backend(self, id_: str) -> int:
        for backend, known in self._numbering.ids.items():
            if known == id_:
                return backend
        raise ActionError(f"There is no element [{id_}] on this page.", "Name one that you can see.")

    async def _click(self, id_: str) -> None:
        which = {"backendNodeId": self._backend(id_)}
        try:
            await self._cdp.send("DOM.scrollIntoViewIfNeeded", which)
            point = await self._on(id_, POINT)
        except Error as error:
            self._raise_if_gone(error)
            raise ActionError(f"[{id_}] cannot be clicked: it is not shown.") from None
        if point is None:
            raise ActionError(f"[{id_}] cannot be clicked: it has no size.")
        at = {"x": point[0], "y": point[1]}
        press = {**at, "button": "left", "clickCount": 1}
        # The three reach the page in order, whoever answers first.
        await asyncio.gather(
            self._cdp.send("Input.dispatchMouseEvent", {"type": "mouseMoved", **at}),
            self._cdp.send("Input.dispatchMouseEvent", {"type": "mousePressed", **press}),
            self._cdp.send("Input.dispatchMouseEvent", {"type": "mouseReleased", **press}),
        )

    async def _type(self, id_: str, text: str, enter: bool, *, picked: bool) -> None:
        if picked:
            if not await self._on(id_, SET_DATE, text):
                raise ActionError(
                    f"[{id_}] does not take {text[:40]!r}.", "Write a date as 2026-03-31, a time as 14:05."
                )
        else:
            if not await self._on(id_, EMPTY):
                raise ActionError(f"[{id_}] is no field that can be typed into.")
            if not text:
                await self._key("Delete", 46)
            elif len(text) <= MAX_KEYS and text.isascii() and text.isprintable():
                await asyncio.gather(*(self._key(char, _key_code(char), char) for char in text))
            else:
                await self._cdp.send("Input.insertText", {"text": text})
        if enter:
            await self._key("Enter", 13, "\r")

    async def _key(self, key: str, code: int, text: str = "") -> None:
        what = {"key": key, "code": key if len(key) > 1 else "", "windowsVirtualKeyCode": code}
        down = {"type": "keyDown" if text else "rawKeyDown", **what, **({"text": text} if text else {})}
        # They reach the page in order, whoever answers first.
        await asyncio.gather(
            self._cdp.send("Input.dispatchKeyEvent", down),
            self._cdp.send("Input.dispatchKeyEvent", {"type": "keyUp", **what}),
        )

    def _raise_if_gone(self, error: Error) -> None:
        if self.crashed or not self.browser.is_running:
            raise error

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_S
        while loop.time() < end:
            if self._loading or self.gate.busy:
                await asyncio.sleep(POLL_S)
                continue
            try:
                async with asyncio.timeout(SETTLE_S):
                    await self._cdp.send("Runtime.evaluate", {"expression": QUIET, "awaitPromise": True})
            except TimeoutError:
                return
            except Error as error:
                # Another document took the place of the one that was asked.
                self._raise_if_gone(error)
                continue
            if not (self._loading or self.gate.busy):
                return
