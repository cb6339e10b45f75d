"""Documents as plain text, in chunks: HTML, Markdown, text, PDF.

Invariants: a file outside the folder that was given is never read, whatever links or `..` say; chunks in order, joined
by newlines, are the text, so that what is found in parallel can be merged in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from pypdf import PdfReader
from pypdf.errors import PyPdfError

from shoal.agents.tools.function import ToolError

CHUNK_CHARS = 3000
MAX_FILE_BYTES = 32 * 2**20
MAX_PAGES = 2000
MAX_FILES = 10_000

SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".csv", ".json", ".html", ".htm", ".pdf")

_SKIPPED = {"script", "style", "noscript", "template", "head"}
_BLOCKS = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section", "article", "pre"}


class _Words(HTMLParser):
    """What a reader of a page sees, roughly."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(0, self._skipping - (tag in _SKIPPED))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def html_text(page: str) -> str:
    """A page's text, a block a line."""
    words = _Words()
    words.feed(page)
    words.close()
    lines = (re.sub(r"[ \t\r\f\v]+", " ", line).strip() for line in "".join(words.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def files_below(root: Path) -> list[str]:
    """Names of the readable documents below a folder, sorted."""
    found = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())
    names = []
    for path in found:
        if _is_below(path, root):
            names.append(str(path.relative_to(root)))
        if len(names) == MAX_FILES:
            break
    return names


def read_text(root: Path, name: str) -> str:
    """A document's text.

    Raises:
        ToolError: it is not there, not below the folder, too large, or cannot be read.
    """
    path = root / name
    if "\0" in name or not _is_below(path, root) or not path.is_file():
        raise ToolError(f"there is no document {name!r}")
    if path.suffix.lower() not in SUFFIXES:
        raise ToolError(f"documents of the kind {path.suffix!r} cannot be read")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ToolError(f"{name} has more than {MAX_FILE_BYTES} bytes")
    if path.suffix.lower() == ".pdf":
        return _pdf_text(path, name)
    text = path.read_bytes().decode("utf-8", "replace")
    return html_text(text) if path.suffix.lower() in (".html", ".htm") else text


def chunks(text: str) -> list[str]:
    """The text in pieces of about `CHUNK_CHARS`, cut between lines where that is possible; at least one piece."""
    found: list[str] = []
    held: list[str] = []
    size = 0
    for line in _pieces(text):
        if held and size + len(line) + 1 > CHUNK_CHARS:
            found.append("\n".join(held))
            held, size = [], 0
        held.append(line)
        size += len(line) + 1
    return [*found, "\n".join(held)]


def _pieces(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, max(len(line), 1), CHUNK_CHARS):
            yield line[start : start + CHUNK_CHARS]


def _pdf_text(path: Path, name: str) -> str:
    try:
        reader = PdfReader(path)
        return "\n".join(page.extract_text() for page in reader.pages[:MAX_PAGES])
    except (PyPdfError, ValueError, KeyError, TypeError, RecursionError, OSError, AttributeError, IndexError) as error:
        raise ToolError(f"{name} cannot be read as a PDF: {type(error).__name__}: {error}") from None


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())
