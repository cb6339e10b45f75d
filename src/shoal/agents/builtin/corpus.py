"""Search in the documents of a folder, by BM25 over their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from shoal.agents.builtin.bm25 import Bm25
from shoal.agents.builtin.text import chunks, files_below, read_text
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee


class Hit(BaseModel):
    """A chunk that fits."""

    document: str
    chunk: int
    score: float
    text: str


class Corpus:
    """The chunks of all documents below a folder, indexed on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def _chunks(self) -> list[tuple[str, int, str]]:
        found = []
        for name in files_below(self._root):
            try:
                text = read_text(self._root, name)
            except ToolError:
                continue  # One damaged file does not close the library.
            found += [(name, number, chunk) for number, chunk in enumerate(chunks(text))]
        return found

    @cached_property
    def _index(self) -> Bm25:
        return Bm25([text for _, _, text in self._chunks])

    def search(self, query: str, count: int) -> list[Hit]:
        """The best chunks, best first."""
        found = []
        for number, score in self._index.best(query, count):
            name, chunk, text = self._chunks[number]
            found.append(Hit(document=name, chunk=chunk, score=round(score, 4), text=text))
        return found


def corpus_tools(root: Path) -> Sequence[Callee]:
    """A tool that searches below `root`."""
    corpus = Corpus(root)

    def search(
        query: Annotated[str, Field(min_length=1, max_length=1000)], count: Annotated[int, Field(ge=1, le=20)] = 3
    ) -> list[Hit]:
        """Search the documents; returns the passages that fit best."""
        return corpus.search(query, count)

    return [FunctionTool(search, Use(idempotent=True, max_concurrency=16, timeout_s=60))]
