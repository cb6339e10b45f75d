"""Search in the documents of a folder: BM25 and embeddings over their chunks, fused by rank.

BM25 finds the rare word, the embedding the near one: other endings, other spellings, other word order. The embedder is
memory's (`memory/embedding`): features of words and letters, no learnt model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from shoal.agents.builtin.bm25 import Bm25
from shoal.agents.builtin.fusion import fused
from shoal.agents.builtin.text import chunks, files_below, read_text
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee
from shoal.memory.embedding import Embedder, HashedEmbedder

CANDIDATES = 50
"""Of each ranking that are fused."""


class Hit(BaseModel):
    """A chunk that fits."""

    document: str
    chunk: int
    score: float
    text: str


class Corpus:
    """The chunks of all documents below a folder, indexed on first use."""

    def __init__(self, root: Path, embedder: Embedder | None = None) -> None:
        self._root = root
        self._embedder = embedder or HashedEmbedder()

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

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        return self._embedder.embed([text for _, _, text in self._chunks])

    def search(self, query: str, count: int) -> list[Hit]:
        """The best chunks, best first."""
        if not self._chunks:
            return []
        most = max(count, CANDIDATES)
        words = [number for number, _ in self._index.best(query, most)]
        near = self._vectors @ self._embedder.embed([query])[0]
        meaning = [int(number) for number in np.argsort(-near, kind="stable")[:most] if near[number] > 0]
        found = []
        for number, score in fused([words, meaning], count):
            name, chunk, text = self._chunks[number]
            found.append(Hit(document=name, chunk=chunk, score=round(score, 6), text=text))
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
