"""What the project's pages and help texts show: commands, and Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal import PROTOCOL_VERSION
from shoal.cli.app import build_app
from shoal.config import load_config
from shoal.fabric.ticket import RouterAddress

REPOSITORY = Path(__file__).resolve().parents[2]

ROUTER_LINE = RouterAddress(PROTOCOL_VERSION, bytes(32), ("router.test:7447",)).encode()
"""In place of the line that a page cuts off."""

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = re.compile(r"For example:\n\n((?:[ ]{8}.*\n|\n)+)")
PROMPT = re.compile(r"^(?:\$ )?((?:[A-Z_]+=\S* )*)(?=(?:shoal|make) )")
COMMENT = re.compile(r"\s#\s.*$")
PLACEHOLDERS = {"[...]": "x", "…": "x"}


def pages() -> list[Path]:
    """What people read."""
    return sorted(
        [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "deploy").rglob("*.md")]
    )


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Language and content of a page's code blocks."""
    for found in FENCED.finditer(path.read_text(encoding="utf-8")):
        yield found[1], found[2]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `shoal` and `make` command in a block of text, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        rest = COMMENT.sub("", line.strip())
        while rest:
            begun = PROMPT.match(rest)
            if begun is None:
                break
            words, rest = _until_end(rest[begun.end() :])
            yield words


def _until_end(text: str) -> tuple[list[str], str]:
    """The words of the first command, and what follows it after `;`, `|` or `&&`."""
    for shown, meant in PLACEHOLDERS.items():
        text = text.replace(shown, meant)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in lexer:
        if word.startswith("#"):
            return words, ""
        if set(word) <= set(";|&"):
            return words, " ".join(shlex.quote(one) for one in lexer)
        if set(word) <= set("<>()"):
            return words, ""
        words.append(word)
    return words, ""


def shown_in_pages() -> list[tuple[str, list[str]]]:
    """Every command of every page, with the page's name."""
    return [
        (str(path.relative_to(REPOSITORY)), words)
        for path in pages()
        for language, content in blocks(path)
        if language in ("", "sh", "bash", "console", "shell") and "─" not in content  # a diagram
        for words in commands(content)
    ]


def shown_in_help() -> list[tuple[str, list[str]]]:
    """Every command in the examples of the command line's own help, with its module."""
    folder = REPOSITORY / "src" / "shoal" / "cli"
    return [
        (path.name, words)
        for path in sorted(folder.glob("*.py"))
        for found in EXAMPLES.finditer(path.read_text(encoding="utf-8"))
        for words in commands(found[1])
    ]


def python_blocks() -> list[tuple[str, str]]:
    """Every Python block of every page."""
    return [
        (str(path.relative_to(REPOSITORY)), content)
        for path in pages()
        for language, content in blocks(path)
        if language in ("python", "py")
    ]


def take(words: Sequence[str]) -> None:
    """Have a command's words read, nothing done; raises what the command line would say."""
    _, bound, _ = build_app(words[0]).parse_args(list(words), exit_on_error=False, print_error=False)
    config, overrides = bound.arguments.get("config"), bound.arguments.get("overrides")
    if words[0] == "train" and config and overrides:
        path = REPOSITORY / config
        load_config(path if path.is_file() else config, [text.replace("shoalr1x", ROUTER_LINE) for text in overrides])
