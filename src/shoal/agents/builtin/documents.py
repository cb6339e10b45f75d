"""Reading the documents of a folder, chunk by chunk, so that many chunks can be read at once and merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from shoal.agents.builtin.text import chunks, files_below, read_text
from shoal.agents.tools.card import Use
from shoal.agents.tools.function import FunctionTool, ToolError
from shoal.agents.tools.toolbox import Callee

MAX_MATCHES = 50

Name = Annotated[str, Field(description="as list_documents names it", max_length=1024)]


class Chunk(BaseModel):
    """A part of a document."""

    document: str
    chunk: int
    chunks: int
    """How many the document has."""
    text: str


class Match(BaseModel):
    """A line that contains what was looked for."""

    chunk: int
    line: str


def document_tools(root: Path) -> Sequence[Callee]:
    """Tools that read the documents below `root`."""

    def list_documents() -> list[str]:
        """The names of all documents."""
        return files_below(root)

    def read_document(document: Name, chunk: Annotated[int, Field(ge=0, description="from 0")] = 0) -> Chunk:
        """One chunk of a document, and how many there are; read the others at the same time."""
        found = chunks(read_text(root, document))
        if chunk >= len(found):
            raise ToolError(f"{document} has {len(found)} chunks, counted from 0")
        return Chunk(document=document, chunk=chunk, chunks=len(found), text=found[chunk])

    def find_in_document(
        document: Name, words: Annotated[str, Field(min_length=1, max_length=200, description="any case")]
    ) -> list[Match]:
        """The lines of a document that contain some words."""
        wanted = words.casefold()
        found = [
            Match(chunk=number, line=line[:500])
            for number, chunk in enumerate(chunks(read_text(root, document)))
            for line in chunk.split("\n")
            if wanted in line.casefold()
        ]
        return found[:MAX_MATCHES]

    use = Use(idempotent=True, max_concurrency=16, timeout_s=60)
    return [FunctionTool(one, use) for one in (list_documents, read_document, find_in_document)]
