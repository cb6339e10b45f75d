"""What a machine remembers: written, searched, checked.

Invariant: nothing that is added is shown to a model before trials have shown that it helps; `shoal memory replay` and
`learn` make such trials. This module drives no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shoal.memory.keeper import Keeper
    from shoal.memory.recall import Recall
    from shoal.memory.retrieval import Found
    from shoal.memory.state import Memory as Remembered

Status = Literal["active", "candidate", "demoted", "rejected", "removed"]


class Memory:
    """The memories in a folder. Close it, or use it as a context; one thread at a time.

    Examples:
        ```python
        import shoal

        with shoal.Memory("notes") as memory:
            memory.add("Write the carry above the next column.", family="arithmetic")
            print([one.entry.text for one in memory.all("candidate")])
            for found in memory.search("How do I add 17 and 25?"):
                print(found.score, found.memory.entry.text)
        ```
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """
        Args:
            folder: where they are; made on first use. By default memory/ in Shoal's data directory.

        Raises:
            StorageError: the folder cannot be used, or what is in it is damaged.
        """
        from shoal.cli.memory_store import opened

        self.keeper: Keeper = opened(None if folder is None else Path(folder).expanduser())
        """All that can be done with them."""

    def add(self, text: str, *, family: str, user: str = "", ttl_days: float = 0.0) -> Remembered:
        """Write a candidate down.

        Args:
            text: what to remember.
            family: the environment whose tasks it is about.
            user: whom it is for; by default everybody.
            ttl_days: days until it expires; 0 keeps it.

        Raises:
            RecordError: it is too long, or looks like orders, code or a secret.
        """
        from shoal.cli.memory_store import entry_of

        return self.keeper.add(entry_of(text, family=family, user=user, ttl_s=ttl_days * 86400.0))

    def search(self, query: str, k: int = 5, *, family: str = "") -> list[Found]:
        """The best active memories for `query`, by similarity times weight."""
        return self.keeper.search(query, k, family=family)

    def recall(self, query: str, *, max_bytes: int = 2000, family: str = "") -> Recall:
        """A block for a prompt, marked as recalled data; empty text where nothing fits."""
        return self.keeper.recall(
            query, max_tokens=max_bytes, count_tokens=lambda text: len(text.encode()), family=family
        )

    def all(self, *statuses: Status) -> list[Remembered]:
        """Those of these statuses, by default active."""
        return list(self.keeper.store.memories(*(statuses or ("active",))))

    def remove(self, entry: str) -> None:
        """Take one back, by its id or the beginning of it; `shoal memory undo` brings it back."""
        from shoal.cli.memory_store import found_by

        self.keeper.remove(found_by(self.keeper, entry).id)

    def close(self) -> None:
        """Let go of the folder."""
        self.keeper.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
