"""What is remembered, put before what a conversation asks last.

Invariants: the notes are marked as data and within their token budget, by the served model's own tokenizer; a request
that names a user sees that user's memories and everybody's, and one that names none only everybody's; a conversation
that does not end with the user's own words is left as it is; nothing is written down here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ConfigError
from shoal.memory.keeper import Keeper
from shoal.memory.records import Scope
from shoal.serving.schema import ChatMessage


class Notes:
    """The memories of a folder, for conversations.

    Raises:
        ConfigError: there are no memories in the folder.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
        folder = folder.expanduser()
        if not (folder / "memory.db").exists():
            raise ConfigError(f"there are no memories in {folder}.", "Name the folder of a node's memories.")
        self._keeper = Keeper(folder, "server")
        self._tokenizer, self._max_tokens = tokenizer, max_tokens

    def close(self) -> None:
        self._keeper.close()

    def put(self, messages: Sequence[ChatMessage], user: str | None) -> list[ChatMessage]:
        """The conversation with notes before its last message."""
        *before, last = messages
        if last.role != "user" or not isinstance(last.content, str):
            return list(messages)
        block = self._keeper.recall(
            last.content,
            max_tokens=self._max_tokens,
            count_tokens=lambda text: len(self._tokenizer.encode(text)),
            scope=Scope(user=(user or "")[:256]),
        )
        if not block.entries:
            return list(messages)
        return [*before, last.model_copy(update={"content": f"{block.text}\n\n{last.content}"})]
