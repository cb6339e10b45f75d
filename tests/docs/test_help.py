"""Each command's help shows how it is called."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
from documented import REPOSITORY

sys.path.append(str(REPOSITORY / "docs" / "site"))

from reference import all_commands, command_line, modules, rooms

COMMANDS = list(all_commands())


def test_there_are_all() -> None:
    names = {" ".join(words) for words, _ in COMMANDS}
    assert {"train", "memory add", "eval", "eval evm", "agent join", "dream fit"} <= names and len(names) > 50


@pytest.mark.parametrize(
    ("words", "app"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_help_has_an_example_of_the_command_itself(words: tuple[str, ...], app: object) -> None:
    told = inspect.getdoc(app.default_command) or ""  # type: ignore[attr-defined]
    examples = re.search(r"For example:\n\n((?: {4}.*\n?|\n)+)", told)
    assert examples, f"shoal {' '.join(words)} --help has no example"
    assert re.search(rf"^    shoal {' '.join(words)}\b", examples[1], flags=re.MULTILINE)


def test_the_reference_has_every_command_with_its_examples() -> None:
    page = command_line()
    for words, _ in COMMANDS:
        assert re.search(rf"^#+ shoal {' '.join(words)}$", page, flags=re.MULTILINE), words
    assert "    shoal train --resume runs/" in page and "Table of Contents" not in page
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (shoal .*)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= anchors


def test_the_reference_has_every_room() -> None:
    sources = REPOSITORY / "src" / "shoal"
    pages = rooms()
    assert set(pages) == {f"{path.parent.name}.md" for path in sources.glob("*/__init__.py")} - {"cli.md"}
    assert "shoal.planning.staleness" in modules(sources / "planning")
    assert not any("._" in line for page in pages.values() for line in page.splitlines() if line.startswith("::: "))
