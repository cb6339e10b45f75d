"""Building web pages: files in a folder, opened in a real browser and checked there.

Invariants: nothing outside the folder is written or read, whatever links or `..` say; a page that is checked reaches
no network but its own folder; what its scripts say is data.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
from pydantic import BaseModel, Field

from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.envs.web.browser import BrowserError, borrowed_tab, require_browser
from shoal.envs.web.gate import Request, Response, Site

SUFFIXES = (".html", ".css", ".js", ".mjs", ".json", ".svg", ".txt")
MAX_FILE_CHARS = 200_000
MAX_FILES = 200
HOST = "page.test"
MAX_ERRORS = 20
MAX_CHECKS = 50

WATCH = b"""<script>(() => {
  const said = window.__shoal_errors = [];
  const add = text => { if (said.length < 20) said.push(String(text).slice(0, 300)); };
  addEventListener('error', e => add(e.message || 'a resource did not load: ' + (e.target.src || e.target.href)), true);
  addEventListener('unhandledrejection', e => add('unhandled rejection: ' + e.reason));
  const old = console.error;
  console.error = (...words) => { add(words.join(' ')); old.apply(console, words); };
})();</script>"""
"""Put in front of each page that is checked: keeps what goes wrong in it, from its first script on."""

LOOK = """given => ({
  errors: window.__shoal_errors || [],
  missing: given.selectors.filter(one => {
    try { return !document.querySelector(one); } catch (error) { return true; }
  }),
  words: document.body ? document.body.innerText : '',
  title: document.title,
  asked: performance.getEntriesByType('resource').map(one => new URL(one.name).hostname),
})"""

Name = Annotated[str, Field(min_length=1, max_length=200, description="such as index.html or css/main.css")]
Checks = Annotated[list[Annotated[str, Field(max_length=300)]], Field(max_length=MAX_CHECKS)]


class Checked(BaseModel):
    """How a page stands up to what was asked of it."""

    ok: bool
    title: str
    console_errors: list[str]
    missing_files: list[str]
    """Files that the page asks for and that are not there."""
    outside_hosts: list[str]
    """Hosts that it wanted to reach; a page must bring what it needs."""
    missing_selectors: list[str]
    missing_texts: list[str]
    text: str
    """What a visitor reads, cut."""


class _Looked(msgspec.Struct):
    errors: list[Any] = []
    missing: list[str] = []
    words: str = ""
    title: str = ""
    asked: list[str] = []
    """Hosts that the page itself asked; the browser has wishes of its own."""


def page_tools(root: Path) -> Sequence[Callee]:
    """Tools that build pages in `root`.

    Raises:
        BrowserError: there is no browser here, with the line that installs one.
    """
    require_browser()

    def place(name: str) -> Path:
        path = _below(root, name)
        if path is None:
            raise ToolError(f"{name[:200]!r} is no name here: inside the folder, ending in {', '.join(SUFFIXES)}")
        return path

    def write_file(name: Name, content: Annotated[str, Field(max_length=MAX_FILE_CHARS)]) -> str:
        """Write a file of the page: HTML, CSS, JavaScript, JSON or SVG."""
        path = place(name)
        if not path.exists() and len(_files(root)) >= MAX_FILES:
            raise ToolError(f"there are {MAX_FILES} files already")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ToolError(f"{name} cannot be written: {error}") from None
        return f"{name}: {len(content)} characters"

    def read_file(name: Name) -> str:
        """What a file holds."""
        path = place(name)
        if not path.is_file():
            raise ToolError(f"there is no file {name!r}; there are: {', '.join(_files(root)) or 'none'}")
        return path.read_text(encoding="utf-8", errors="replace")

    async def check_page(name: Name, selectors: Checks | None = None, texts: Checks | None = None) -> Checked:
        """Open a page in a browser; says what goes wrong in it, and which CSS selectors and texts are not found."""
        if not place(name).is_file():
            raise ToolError(f"there is no file {name!r}; there are: {', '.join(_files(root)) or 'none'}")
        missing: list[str] = []
        try:
            async with borrowed_tab(sites={HOST: site_of(root, missing)}) as tab:
                await tab.goto(f"http://{HOST}/{name}")
                looked = msgspec.convert(await tab.evaluate(LOOK, {"selectors": selectors or []}), _Looked)
                refused = [host for host in tab.gate.refused if host in looked.asked]
        except BrowserError as error:
            raise ToolError(error.problem, retryable=True) from None
        except msgspec.ValidationError:
            raise ToolError("the page has changed how it is looked at") from None
        errors = [str(one)[:300] for one in looked.errors[:MAX_ERRORS]]
        absent = [one for one in texts or [] if " ".join(one.split()) not in " ".join(looked.words.split())]
        return Checked(
            ok=not (errors or missing or refused or looked.missing or absent),
            title=looked.title[:300],
            console_errors=errors,
            missing_files=missing[:MAX_ERRORS],
            outside_hosts=refused[:MAX_ERRORS],
            missing_selectors=looked.missing[:MAX_CHECKS],
            missing_texts=absent,
            text=looked.words[:2000],
        )

    use = Use(idempotent=True, max_concurrency=2, timeout_s=120)
    return [FunctionTool(one, use) for one in (write_file, read_file, check_page)]


def site_of(root: Path, missing: list[str]) -> Site:
    """Serves the folder's files to a page that is checked, and notes what is asked for and not there."""

    def answer(asked: Request) -> Response:
        name = unquote(asked.path).lstrip("/") or "index.html"
        path = _below(root, name)
        if asked.method != "GET" or path is None or not path.is_file():
            if name != "favicon.ico" and len(missing) < MAX_ERRORS and name not in missing:
                missing.append(name)
            return Response(b"not found", 404, "text/plain")
        body = path.read_bytes()
        kind = mimetypes.guess_type(path.name)[0] or "text/plain"
        if path.suffix.lower() == ".html":
            return Response(_watched(body))
        return Response(body, 200, f"{kind}; charset=utf-8")

    return answer


def _below(root: Path, name: str) -> Path | None:
    """The file of this name in the folder, links followed; nothing where it lies elsewhere or is of another kind."""
    if "\0" in name:
        return None
    path = (root / name).resolve()
    return path if path.is_relative_to(root.resolve()) and path.suffix.lower() in SUFFIXES else None


def _watched(page: bytes) -> bytes:
    """The page with `WATCH` before its first script; behind the doctype, which must stay first."""
    start = page.lower().find(b"<!doctype")
    end = page.find(b">", start) + 1 if start >= 0 else 0
    return page[:end] + WATCH + page[end:]


def _files(root: Path) -> list[str]:
    found = (path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    return sorted(str(path.relative_to(root)) for path in found)[: MAX_FILES + 1]
