"""The built-in tools by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.agents.tools.toolbox import Callee
from shoal.errors import ConfigError

BUILTIN: dict[str, str] = {
    "calculator": "exact arithmetic",
    "python": "Python programs in a sandbox without files or network",
    "documents": "HTML, Markdown, text and PDF files of a folder, in chunks",
    "corpus": "search in the documents of a folder",
}
"""Name to what it does."""

NEEDS_ROOT = ("documents", "corpus")


def builtin_tools(name: str, root: Path | None = None) -> Sequence[Callee]:
    """The tools called `name`.

    Args:
        root: the folder that `documents` and `corpus` read.

    Raises:
        ConfigError: there are no such tools, or the folder is not named or not there.
    """
    if name not in BUILTIN:
        raise ConfigError(f"there are no built-in tools {name!r}.", f"There are: {', '.join(BUILTIN)}.")
    if name in NEEDS_ROOT and (root is None or not root.is_dir()):
        raise ConfigError(f"the tools {name} need a folder to read, not {root}.", "Name it with --root.")
    match name:
        case "calculator":
            from shoal.agents.builtin.calculator import tools
        case "python":
            from shoal.agents.builtin.python import tools
        case _:
            assert root is not None
            if name == "documents":
                from shoal.agents.builtin.documents import document_tools

                return document_tools(root)
            from shoal.agents.builtin.corpus import corpus_tools

            return corpus_tools(root)
    return tools()
