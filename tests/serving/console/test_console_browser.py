"""The console in real Chromium, over a training that really runs: every view, both widths, both themes, a restart.

With SHOAL_SCREENSHOTS set to a folder, every view's picture is left there.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from console_cases import agent_events, write_log
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright
from runs import PATIENCE_S, Process, Runs
from test_console_memories import remember

from shoal.envs.web.browser import ARGUMENTS, BrowserError, require_browser
from shoal.serving.console.house import VIEWS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SIZES = {"wide": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
THEMES = ("light", "dark")
PATIENCE_MS = 1000 * PATIENCE_S
STEP = (
    "Number([...document.querySelectorAll('.card')].find((card) => card.innerText.startsWith('step'))"
    ".innerText.split('\\n')[1].replace(',', ''))"
)
"""The step that the overview shows."""

ADDRESS = re.compile(r"the console is at (http://\S+?)[;,\s]")


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """A browser, where this machine has one."""
    try:
        program = require_browser()
    except BrowserError as error:
        pytest.skip(f"needs a browser: {error}")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=str(program), args=[*ARGUMENTS, "--no-sandbox"], timeout=PATIENCE_MS
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def visiting(browser: Browser, size: str = "wide", theme: str = "light") -> AsyncIterator[tuple[Page, list[str]]]:
    """A page, and what its browser complains about."""
    context = await browser.new_context(viewport=SIZES[size], color_scheme=theme)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    page.on("console", heard)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page, complaints
    await context.close()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def address(process: Process) -> str:
    """Where a command says that its console is."""
    until(lambda: ADDRESS.search(process.said) is not None or process.process.poll() is not None, "an address")
    found = ADDRESS.search(process.said)
    assert found is not None, process.said
    return found[1]


async def comes(page: Page, expression: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until it holds; asked from outside, because the pages' policy forbids the browser's own `eval`."""
    deadline = time.monotonic() + patience_s
    while not await page.evaluate(expression):
        assert time.monotonic() < deadline, f"never: {expression}"
        await asyncio.sleep(0.1)


async def is_live(page: Page) -> None:
    await comes(page, "document.getElementById('state').textContent === 'live'")


async def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("SHOAL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@dataclass(frozen=True)
class Watched:
    """A training that goes on, and its consoles."""

    runs: Runs
    training: Process
    beside: str
    """The pages of the console in the run's own process."""
    watching: Process
    url: str
    """Those of a console of its own."""


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One training for all tests of this module, with memories and agents' runs beside it."""
    runs = Runs(tmp_path_factory.mktemp("watched"), tiny_model)
    remember(runs.home / "memory", "Begin with a digit.", "Answer with the number alone.")
    (runs.home / "agents").mkdir(parents=True)
    write_log(runs.home / "agents" / "runs.db", agent_events("20260101-000000-aa"))
    try:
        training = runs.train("--console", "--console-port", "0", run__steps=20_000)
        beside = address(training)
        watching = runs.shoal("console", runs.run.path, "--port", "0")
        made = Watched(runs, training, beside, watching, address(watching))
        until(lambda: len(runs.run.steps) >= 6, "six steps")
        yield made
    finally:
        runs.close()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES)
async def test_every_view(chromium: Browser, watched: Watched, size: str, theme: str) -> None:
    async with visiting(chromium, size, theme) as (page, complaints):
        for view in VIEWS:
            await page.goto(f"{watched.url}/{view}{'?episode=0' if view == 'episodes' else ''}")
            await is_live(page)
            await comes(page, "document.getElementById('main').innerText.length > 60")
            wide = await page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1], f"{view} scrolls sideways"
            await picture(page, f"{view}-{size}-{theme}")
        assert complaints == []


async def test_views_hold_what_there_is_and_go_on_by_themselves(chromium: Browser, watched: Watched) -> None:
    async with visiting(chromium) as (page, complaints):
        for root in (watched.url, watched.beside):
            await page.goto(f"{root}/overview")
            assert "runs" in await page.inner_text("main")
            before = await page.evaluate(STEP)
            await comes(page, f"{STEP} > {before}")
        await page.goto(f"{watched.url}/swarm")
        for name in ("local-0", "local-1", "learner"):
            await page.wait_for_selector(f"text={name}")
        await page.goto(f"{watched.url}/run")
        assert await page.locator("svg polyline").count() >= 8
        await page.goto(f"{watched.url}/agents")
        assert await page.locator(".lane").count() == 2
        await page.goto(f"{watched.url}/memory")
        await page.click("table a")
        await page.wait_for_selector("text=Audit")
        await picture(page, "memory-entry")
        assert complaints == []


async def test_the_keyboard_and_a_search(chromium: Browser, watched: Watched) -> None:
    url = watched.url
    async with visiting(chromium) as (page, complaints):
        await page.goto(f"{url}/overview")
        await is_live(page)
        await page.keyboard.press("?")
        assert await page.locator("dialog").is_visible()
        await picture(page, "help")
        await page.keyboard.press("Escape")
        assert not await page.locator("dialog").is_visible()
        before = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.keyboard.press("t")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        await page.keyboard.press("6")
        await page.wait_for_url("**/console/episodes")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != before, "the theme stays"
        await is_live(page)
        await page.keyboard.press("/")
        await page.keyboard.type("nothing that anybody said")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=None was found.")
        assert complaints == []


async def test_a_page_comes_back_after_a_restart(chromium: Browser, watched: Watched) -> None:
    """By itself, and is brought up to date."""
    runs = watched.runs
    first = runs.shoal("console", runs.run.path, "--port", "0")
    url = address(first)
    port = url.split(":")[2].split("/")[0]
    async with visiting(chromium) as (page, _):
        await page.goto(f"{url}/overview")
        await is_live(page)
        first.send(signal.SIGKILL)
        await comes(page, "document.getElementById('state').textContent.startsWith('reconnecting')")
        steps = len(runs.run.steps)
        until(lambda: len(runs.run.steps) > steps + 1, "the run goes on meanwhile")
        second = runs.shoal("console", runs.run.path, "--port", port)
        address(second)
        await is_live(page)
        await comes(page, f"{STEP} > {steps}")
    second.send(signal.SIGTERM)
    second.wait()


async def test_a_run_that_was_stopped_can_still_be_read(chromium: Browser, watched: Watched) -> None:
    watched.training.send(signal.SIGINT)
    watched.training.wait()
    async with visiting(chromium) as (page, complaints):
        await page.goto(f"{watched.url}/overview")
        await page.wait_for_selector("text=stopped")
        for view in ("run", "swarm", "episodes"):
            await page.goto(f"{watched.url}/{view}")
            await is_live(page)
        assert complaints == []


async def test_two_versions_answer_side_by_side(chromium: Browser, watched: Watched) -> None:
    """Of the run that the test before has stopped: one that goes on prunes its versions within seconds."""
    url = watched.url
    async with visiting(chromium) as (page, complaints):
        await page.goto(f"{url}/playground")
        await is_live(page)
        await page.fill("textarea", "7?")
        await page.fill("input[name=max_tokens]", "8")
        await page.keyboard.press("Control+Enter")
        took = "[...document.querySelectorAll('.took')].map((one) => one.textContent)"
        await comes(page, f"{took}.every((words) => /tokens in|[.]$/.test(words))", 3 * PATIENCE_S)
        words = await page.evaluate(took)
        assert all("tokens in" in one for one in words), words
        await picture(page, "playground-talk")
        assert complaints == []
    watched.watching.send(signal.SIGTERM)
    assert watched.watching.wait() == 0


async def test_a_key_opens_the_pages(chromium: Browser, runs: Runs) -> None:
    made = runs.shoal("console", "--new-key", "alice", "--json")
    made.wait()
    key = made.result["key"]
    console = runs.shoal("console", "--port", "0")
    url = address(console)
    async with visiting(chromium) as (page, complaints):
        await page.goto(f"{url}/overview")
        await page.wait_for_url("**/console/login")
        await picture(page, "login")
        await page.fill("input[name=key]", "wrong")
        await page.click("button")
        await page.wait_for_selector("text=not known")
        await page.fill("input[name=key]", key)
        await page.click("button")
        await page.wait_for_url("**/console/overview")
        await is_live(page)
        assert [one for one in complaints if "401" not in one] == []
        await page.click("text=Log out")
        await page.wait_for_url("**/console/login")
    console.send(signal.SIGINT)
    assert console.wait() == 0
