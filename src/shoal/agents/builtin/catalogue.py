"""The built-in tools by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.agents.tools.toolbox import Callee
from shoal.errors import ConfigError

BUILTIN: dict[str, str] = {
    "calculator": "exact arithmetic",
    "python": "Python programs in a sandbox without files or network",
    "documents": "HTML, Markdown, text and PDF files of a folder, in chunks",
    "corpus": "search in the documents of a folder, by words and by likeness",
    "web": "pages of the web, and a search of it by a service of yours",
    "browser": "a browser: pages as numbered elements, clicks, typing",
    "pages": "web pages written into a folder and checked in a browser",
    "evm": "an EVM chain: balances, calls, transactions tried without consequence",
    "memory": "what this machine remembers: search, add",
}
"""Name to what it does."""

NEEDS_ROOT = ("documents", "corpus", "pages")


@dataclass(frozen=True)
class Surroundings:
    """What tools may need besides their name; each takes what concerns it."""

    root: Path | None = None
    """The folder that `documents` and `corpus` read and `pages` writes; where `memory` keeps its file."""
    search_url: str = ""
    """The search service of `web`."""
    allow: tuple[str, ...] = ()
    """Hosts: all that `browser` reaches; those that `web` reads although they are not public."""


def builtin_tools(name: str, given: Surroundings | None = None) -> Sequence[Callee]:
    """The tools called `name`.

    Raises:
        ConfigError: there are no such tools, or what they need is not named, not there or not installed.
    """
    given = given or Surroundings()
    check_builtin(name, given)
    try:
        return _made(name, given)
    except ModuleNotFoundError as error:
        extra = {"evm": "evm", "browser": "web", "pages": "web"}.get(name, "agents")
        raise ConfigError(
            f"the tools {name} need the package {error.name}.", f"Install it: pip install 'shoal[{extra}]'."
        ) from None


def check_builtin(name: str, given: Surroundings) -> None:
    """Raise `ConfigError` where there are no such tools, or the folder that they need is not named or not there."""
    if name not in BUILTIN:
        raise ConfigError(f"there are no built-in tools {name!r}.", f"There are: {', '.join(BUILTIN)}.")
    if name in NEEDS_ROOT and (given.root is None or not given.root.is_dir()):
        raise ConfigError(f"the tools {name} need a folder, not {given.root}.", "Name it with --root.")


def _made(name: str, given: Surroundings) -> Sequence[Callee]:
    match name:
        case "calculator":
            from shoal.agents.builtin.calculator import tools
        case "python":
            from shoal.agents.builtin.python import tools
        case "evm":
            from shoal.agents.builtin.evm import tools
        case "web":
            from shoal.agents.builtin.web import web_tools

            return web_tools(given.search_url, given.allow)
        case "browser":
            from shoal.agents.builtin.browser import browser_tools

            return browser_tools(given.allow)
        case "memory":
            from shoal.agents.builtin.memories import memory_tools

            return memory_tools(given.root)
        case _:
            assert given.root is not None
            return _of_a_folder(name, given.root)
    return tools()


def _of_a_folder(name: str, root: Path) -> Sequence[Callee]:
    match name:
        case "documents":
            from shoal.agents.builtin.documents import document_tools

            return document_tools(root)
        case "pages":
            from shoal.agents.builtin.pages import page_tools

            return page_tools(root)
        case _:
            from shoal.agents.builtin.corpus import corpus_tools

            return corpus_tools(root)
