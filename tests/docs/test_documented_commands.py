"""Every command that a page or a help text shows is one that the command line takes; every Python block can be run."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
from cyclopts import CycloptsError
from documented import REPOSITORY, python_blocks, shown_in_help, shown_in_pages, take

from shoal.cli.app import COMMANDS, INTERNAL
from shoal.errors import ShoalError

SHOWN = sorted({(where, tuple(words)) for where, words in shown_in_pages() + shown_in_help()})
SHOAL = [(where, words[1:]) for where, words in SHOWN if words[0] == "shoal"]
MAKE = [(where, words[1:]) for where, words in SHOWN if words[0] == "make"]


def shown(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


def test_there_is_something_to_check() -> None:
    assert len(SHOAL) > 100 and len(MAKE) > 1 and len(python_blocks()) > 3


@pytest.mark.parametrize(("where", "words"), SHOAL, ids=shown)
def test_a_command_is_taken(where: str, words: tuple[str, ...]) -> None:
    """Its options are there and its values have their types; what it would do is not done."""
    command = next((word for word in words if not word.startswith("-")), None)
    assert command is None or command in (*COMMANDS, *INTERNAL), f"{where}: there is no command {command}"
    if command is None or {"--help", "-h", "--version"} & set(words):
        return
    try:
        take(words)
    except (CycloptsError, ShoalError) as error:
        pytest.fail(f"{where}: shoal {' '.join(words)}: {' '.join(str(error).split())}")


@pytest.mark.parametrize(("where", "words"), MAKE, ids=shown)
def test_a_target_is_there(where: str, words: tuple[str, ...]) -> None:
    targets = set(re.findall(r"^([a-z.-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets, where


@pytest.mark.parametrize(("where", "block"), python_blocks(), ids=lambda value: value[:40].replace("\n", " "))
def test_python_is_python_and_imports_what_there_is(where: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "shoal":
            module = importlib.import_module(str(node.module))
            missing = [one.name for one in node.names if not hasattr(module, one.name)]
            assert not missing, f"{where}: {node.module} has no {missing}"
