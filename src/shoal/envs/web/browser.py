"""The one browser of this process: found, started in a thread of its own, shared, and gone when it is not needed.

    async with borrowed_tab(sites={"shop.test": site}) as tab:
        await tab.goto("http://shop.test/")
        page = await tab.observe()

Whoever calls may be in any event loop, and may block it: the browser's own loop serves pages and waits for them.

Invariants: a tab is a browser context of its own (cookies, storage, cache), whose only way to a network is its gate;
tabs of the pool (`take`) go from one episode to the next, and are for sites of ours that keep nothing in the browser;
every call ends within its deadline; a browser that crashed is a `BrowserError` for those who use it and is started anew
for the next one; when the last tab has been back for `IDLE_S`, and when this process ends in whatever way (`guard`), no
process of the browser is left.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.envs.web.gate import Allowed, Site, opened
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from playwright.async_api import Browser as Chromium

    from shoal.envs.web.tab import Tab

LAUNCH_S = 60.0
CLOSE_S = 10.0
IDLE_S = 20.0
"""A browser that nobody uses is closed after this long."""
MAX_FOLDER_CHARS = 32
"""The system cuts a socket's name at 107 characters, and the browser adds some 60."""
LAUNCHES = 2
"""Attempts to start it, and to get a tab from one that has just crashed."""

USES_PER_TAB = 200
"""After so many episodes a tab of the pool is closed, with whatever it has piled up."""
MAX_TABS = 8
"""Tabs of the pool; who wants another waits for one. Each is a process of a hundred megabytes."""
TAKE_S = 900.0

VIEWPORT = {"width": 1024, "height": 768}
INSTALL = "Install it with: pip install 'shoal[web]' && playwright install chromium (or: apt-get install chromium)."
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OWN_PLACES = ("chromium-*/chrome-linux*/chrome", "chromium-*/chrome-mac*/Chromium.app/Contents/MacOS/Chromium")
"""Where Playwright puts the browsers that it installs."""

ARGUMENTS = (
    "--disable-gpu",
    "--disable-dev-shm-usage",
    # What does not go through a proxy does not go anywhere.
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-quic",
    "--no-pings",
    # Buttons of a window that nobody sees, each a page with a process of its own; and form filling by a server.
    "--disable-features=InitialWebUI,WebUIReloadButton,WebUIToolbar,WebUILocationBar,PreloadTopChromeWebUI,WebUIOmniboxPopup,WebUIOmniboxAimPopup,WebUIOmniboxFullPopup,AutofillServerCommunication",
)

T = TypeVar("T")


class BrowserError(ShoalError):
    """No browser here, or one that crashed, or did not answer in time."""


def find_chromium() -> Path:
    """The browser's program: `SHOAL_CHROMIUM`, then what Playwright installed, then Chromium or Chrome in the PATH.

    Raises:
        BrowserError: there is none; it says how to install one.
    """
    named = os.environ.get("SHOAL_CHROMIUM")
    if named:
        found = Path(named).expanduser()
        if not found.is_file():
            raise BrowserError(
                f"SHOAL_CHROMIUM names {named}, which is no file.", "Name Chromium's program, or unset it."
            )
        return found
    cache = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or "~/.cache/ms-playwright"
    own = [path for place in OWN_PLACES for path in Path(cache).expanduser().glob(place)]
    if own:
        return max(own)
    for program in PROGRAMS:
        if path := shutil.which(program):
            return Path(path)
    raise BrowserError("There is no Chromium on this machine.", INSTALL)


def require_browser() -> Path:
    """`find_chromium`, and that what drives it is installed; starts nothing.

    Raises:
        BrowserError: with the line that installs what is missing.
    """
    try:
        import playwright.async_api  # noqa: F401
    except ImportError:
        raise BrowserError("Playwright, which drives the browser, is not installed.", INSTALL) from None
    return find_chromium()


@dataclass
class Lent:
    """A tab of the pool, for one episode after another."""

    tab: Tab
    key: str
    """What it was last used for."""
    held: AsyncExitStack
    uses: int = 0


@dataclass(frozen=True)
class _Idle:
    lent: Lent
    timer: asyncio.TimerHandle


class Browser:
    """The browser and the thread that owns it; see `the_browser`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.num_launches = 0
        self._chromium: Chromium | None = None
        self._held = AsyncExitStack()
        self._num_tabs = 0
        self._idle: list[_Idle] = []
        self._free = asyncio.Semaphore(MAX_TABS)
        self._closing: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._thread = threading.Thread(target=self.loop.run_forever, name="shoal-browser", daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` in the browser's loop, from whatever loop."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    @property
    def is_running(self) -> bool:
        return self._chromium is not None and self._chromium.is_connected()

    async def close(self) -> None:
        """End the browser's processes; the next tab starts them again."""
        await self.run(self._close())

    def shut(self) -> None:
        """As `close`, from outside any loop, when this process ends."""
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(CLOSE_S + 1)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(1)

    # What follows runs in the browser's loop.

    async def _close(self) -> None:
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        """With the lock."""
        held, self._held, self._chromium = self._held, AsyncExitStack(), None
        idle, self._idle = self._idle, []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                for one in idle:
                    one.timer.cancel()
                    await one.lent.held.aclose()
                await held.aclose()

    async def _running(self) -> Chromium:
        """The browser, started if it is not there."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        async with self._lock:
            if not self.is_running:
                await self._end()
                await self._launch()
        assert self._chromium is not None
        return self._chromium

    async def _launch(self) -> None:
        program = require_browser()
        from playwright.async_api import Error, async_playwright

        try:
            async with asyncio.timeout(LAUNCH_S), AsyncExitStack() as stack:
                scratch = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="shoal-web-", dir=_short_folder(), ignore_cleanup_errors=True)
                )
                wrapper = Path(scratch) / "chromium"
                guard = Path(__file__).with_name("guard.py")
                words = [sys.executable, "-I", "-S", str(guard), str(os.getpid()), scratch, str(program)]
                wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
                wrapper.chmod(0o700)
                driver = await stack.enter_async_context(async_playwright())
                chromium = await driver.chromium.launch(
                    executable_path=wrapper,
                    args=list(ARGUMENTS),
                    # As root, Chromium's own sandbox does not start.
                    chromium_sandbox=os.geteuid() != 0,
                    handle_sigint=False,
                    handle_sigterm=False,
                    handle_sighup=False,
                    env={**os.environ, "TMPDIR": scratch, "XDG_CONFIG_HOME": scratch, "XDG_CACHE_HOME": scratch},
                    timeout=LAUNCH_S * 1000,
                )
                stack.push_async_callback(_close_quietly, chromium)
                self._held, self._chromium = stack.pop_all(), chromium
                self.num_launches += 1
        except (Error, TimeoutError) as error:
            said = " ".join(str(error).split())[:300]
            raise BrowserError(
                f"{program} did not start: {said}", "Run it by hand with --headless to see why."
            ) from None

    @asynccontextmanager
    async def tab(self, sites: Mapping[str, Site], allowed: Allowed) -> AsyncIterator[Tab]:
        """A fresh context with one page; closed, with all it stored, when the context ends."""
        from playwright.async_api import Error

        from shoal.envs.web.tab import Tab

        self._num_tabs += 1
        try:
            async with AsyncExitStack() as stack:
                gate = await stack.enter_async_context(opened(sites, allowed))
                tab: Tab | None = None
                for attempt in range(LAUNCHES):
                    chromium = await self._running()
                    try:
                        async with asyncio.timeout(LAUNCH_S):
                            tab = await Tab.open(self, chromium, gate)
                        break
                    except (Error, TimeoutError) as error:
                        if attempt + 1 == LAUNCHES:
                            raise BrowserError(f"The browser gave no page: {str(error)[:200]}", "Try again.") from None
                assert tab is not None
                stack.push_async_callback(tab.shut)
                yield tab
        finally:
            self._num_tabs -= 1
            if not self._num_tabs:
                self._closing = self.loop.call_later(IDLE_S, self._close_if_idle)

    async def take(self, key: str, sites: Mapping[str, Site]) -> Lent:
        """A tab of the pool: one that was last used with this key, or any, or a new one."""
        try:
            async with asyncio.timeout(TAKE_S):
                await self._free.acquire()
        except TimeoutError:
            problem = f"All {MAX_TABS} tabs were in use for {TAKE_S:.0f} s."
            raise BrowserError(problem, "Run fewer episodes at once.") from None
        try:
            return await self._take(key, sites)
        except BaseException:
            self._free.release()
            raise

    async def _take(self, key: str, sites: Mapping[str, Site]) -> Lent:
        for idle in sorted(self._idle, key=lambda one: one.lent.key != key):
            self._idle.remove(idle)
            idle.timer.cancel()
            if not idle.lent.tab.crashed and self.is_running:
                idle.lent.tab.gate.sites = sites
                return idle.lent
            await idle.lent.held.aclose()
        async with AsyncExitStack() as stack:
            tab = await stack.enter_async_context(self.tab(sites, Allowed()))
            return Lent(tab, key, stack.pop_all())
        raise AssertionError("a tab or an exception")

    async def give(self, lent: Lent, *, broken: bool = False) -> None:
        """Take back what `take` gave."""
        self._free.release()
        lent.uses += 1
        if broken or lent.tab.crashed or lent.uses >= USES_PER_TAB:
            await lent.held.aclose()
            return
        lent.tab.gate.sites = {}
        self._idle.append(_Idle(lent, self.loop.call_later(IDLE_S, self._drop, lent)))

    def _drop(self, lent: Lent) -> None:
        """Close a tab that nobody has wanted for a while."""
        self._idle = [idle for idle in self._idle if idle.lent is not lent]
        self._dropping = self.loop.create_task(lent.held.aclose())

    def _close_if_idle(self) -> None:
        if not self._num_tabs:
            self._idle_task = self.loop.create_task(self._close())


def _short_folder() -> str | None:
    """Where the browser's files may lie: the usual folder, unless the name of a socket in it would be too long."""
    return "/tmp" if len(tempfile.gettempdir()) > MAX_FOLDER_CHARS and Path("/tmp").is_dir() else None


async def _close_quietly(chromium: Chromium) -> None:
    from playwright.async_api import Error

    with contextlib.suppress(Error):
        await chromium.close()


_browser: Browser | None = None
_browser_pid = 0
_making = threading.Lock()


def the_browser() -> Browser:
    """This process's browser; its processes start with the first tab."""
    global _browser, _browser_pid
    with _making:
        if _browser is None or _browser_pid != os.getpid():
            _browser, _browser_pid = Browser(), os.getpid()
            atexit.register(_browser.shut)
        return _browser


async def close_browser() -> None:
    """End the browser's processes now, if there are any."""
    if _browser is not None and _browser_pid == os.getpid():
        await _browser.close()


@asynccontextmanager
async def borrowed_tab(*, sites: Mapping[str, Site] | None = None, allowed: Sequence[str] = ()) -> AsyncIterator[Tab]:
    """An isolated tab.

    Args:
        sites: host -> what answers for it, in this process, under plain HTTP.
        allowed: hosts of the outside that it may reach (`gate.Allowed`); none by default.

    Raises:
        BrowserError: there is no browser, or it does not start.
    """
    require_browser()
    browser = the_browser()
    lending = browser.tab(sites or {}, Allowed(tuple(allowed)))
    tab = await browser.run(lending.__aenter__())
    try:
        yield tab
    finally:
        await browser.run(lending.__aexit__(None, None, None))
