"""The pages that are written anew for each build: the command line's from its own help, the rooms' from docstrings.

Invariant: nothing here is kept in the repository, so nothing can be out of date.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

from shoal.cli.app import COMMANDS, EPILOGUE, build_app

SOURCES = Path(__file__).parents[2] / "src" / "shoal"

LEFT_OUT = {"cli", "configs"}
"""The command line has a page of its own."""

CONTENTS = re.compile(r"^## Table of Contents\n\n(?:[ ]*- .*\n)+\n?", re.MULTILINE)
HEADING = re.compile(r"^(#{2,6}) ", re.MULTILINE)


def command_line() -> str:
    """A page with every command's help."""
    parts = ["# Commands\n", "What `--help` says, command by command.\n", f"```text\n{EPILOGUE}\n```\n"]
    for name in COMMANDS:
        told = build_app(name)[name].generate_docs(heading_level=2, usage_name=f"shoal {name}")
        told = CONTENTS.sub("", told).replace(f"](#{name}", f"](#shoal-{name}")
        parts.append(HEADING.sub(r"\1 shoal ", told))
    return "\n".join(parts)


def all_commands() -> Iterator[tuple[tuple[str, ...], App]]:
    """Every command that does something, with the words that call it."""

    def below(app: App, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], App]]:
        if app.default_command is not None:
            yield words, app
        for name in app:
            if not name.startswith("-"):
                yield from below(app[name], (*words, name))

    for name in COMMANDS:
        yield from below(build_app(name)[name], (name,))


def rooms() -> dict[str, str]:
    """A page a room: file name -> content, in Markdown with mkdocstrings' marks."""
    found = {}
    for folder in sorted(path.parent for path in SOURCES.glob("*/__init__.py")):
        if folder.name not in LEFT_OUT:
            marks = [f"# {folder.name}\n", _mark(f"shoal.{folder.name}", "members: false")]
            found[f"{folder.name}.md"] = "\n".join([*marks, *(_mark(name) for name in modules(folder))])
    return found


def modules(folder: Path) -> list[str]:
    """The public modules of a room; what is private has a name that says so, or no docstring."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(SOURCES.parent).with_suffix("").parts
        if parts[-1] == "__init__" or any(part.startswith("_") for part in parts):
            continue
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(".".join(parts))
    return found


def _mark(name: str, *options: str) -> str:
    lines = "".join(f"        {option}\n" for option in options)
    return f"::: {name}\n" + (f"    options:\n{lines}" if lines else "")
