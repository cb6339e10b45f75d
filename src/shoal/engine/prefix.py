"""Beginnings that were computed before: keys and values of finished sequences, for requests that begin alike.

A conversation's next turn, a shared system prompt or a template's head is then copied instead of computed. Entries are
the whole of a finished sequence (prompt and completion); the least recently used go first.

Invariants: `bytes ≤ budget` after every call; what is given was computed under the weights in place (`clear` at a swap)
for exactly these token ids, and with the same adapter; a match is a multiple of `GRAIN`, so that rows that share a head
share its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

GRAIN = 16
"""Tokens; also the shortest beginning worth copying."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """Keys and values that lie elsewhere: on a pipeline's stages."""

    key: int
    bytes: int
    generation: int
    """What is kept ends with the stages that keep it (`KVCache.generation`)."""


State = Tensor | Kept
"""Keys and values of one sequence, [2, layers, K, length, D], or where they are."""


@dataclass(frozen=True)
class Entry:
    """One sequence's keys and values."""

    ids: Ids
    state: State
    space: str
    """What else it depends on (`Sequence.space`)."""

    @property
    def bytes(self) -> int:
        return self.state.bytes if isinstance(self.state, Kept) else self.state.numel() * self.state.itemsize


class PrefixStore:
    """Entries by their space and first `GRAIN` tokens.

    Args:
        budget_bytes: the most memory that entries may take; 0 keeps nothing.
        forgotten: told of states that are kept no more.
    """

    def __init__(self, budget_bytes: int, forgotten: Callable[[State], None] = lambda _: None) -> None:
        self.budget_bytes = budget_bytes
        self._forgotten = forgotten
        self._generation = 0
        self.bytes = 0
        self._entries: dict[tuple[str, Ids], Entry] = {}
        """Least recently used first."""
        self._by_head: dict[tuple[str, Ids], list[Ids]] = {}

    def find(self, ids: Ids, space: str = "") -> tuple[Entry, int] | None:
        """The entry that shares the longest beginning with `ids`, and that beginning's length."""
        best: tuple[Entry, int] | None = None
        for known in self._by_head.get((space, ids[:GRAIN]), ()):
            length = shared(known, ids)
            if length >= GRAIN and (best is None or length > best[1]):
                best = self._entries[space, known], length
        if best is not None:
            self._entries[space, best[0].ids] = self._entries.pop((space, best[0].ids))
        return best

    def wants(self, ids: Ids, token_bytes: int, space: str = "") -> bool:
        """Whether an entry for `ids` would fit and say something new."""
        if not GRAIN <= len(ids) <= self.budget_bytes // token_bytes:
            return False
        known = self._by_head.get((space, ids[:GRAIN]), ())
        return not any(shared(one, ids) >= len(ids) - GRAIN for one in known)

    def add(self, ids: Ids, state: State, space: str = "") -> None:
        """Keep an entry that `wants` has agreed to; those that it continues are dropped."""
        entry = Entry(ids, state, space)
        for known in [k for k in self._by_head.get((space, ids[:GRAIN]), ()) if ids[: len(k)] == k]:
            self._drop(self._entries[space, known])
        while self.bytes + entry.bytes > self.budget_bytes:
            self._drop(next(iter(self._entries.values())))
        self._entries[space, ids] = entry
        self._by_head.setdefault((space, ids[:GRAIN]), []).append(ids)
        self.bytes += entry.bytes

    def at(self, generation: int) -> None:
        """Told the cache's generation: what was kept in an earlier one is gone."""
        if generation != self._generation:
            self._generation = generation
            self.clear()

    def clear(self) -> None:
        """Forget everything."""
        for entry in self._entries.values():
            self._forgotten(entry.state)
        self._entries.clear()
        self._by_head.clear()
        self.bytes = 0

    def _drop(self, entry: Entry) -> None:
        self.bytes -= self._entries.pop((entry.space, entry.ids)).bytes
        self._forgotten(entry.state)
        key = entry.space, entry.ids[:GRAIN]
        self._by_head[key].remove(entry.ids)
        if not self._by_head[key]:
            del self._by_head[key]


def shared(one: Ids, other: Ids) -> int:
    """Length of the common beginning, in whole `GRAIN`s."""
    low, high = 0, min(len(one), len(other)) // GRAIN
    while low < high:  # bisection, so that tuples are compared by the interpreter and not token by token
        middle = (low + high + 1) // 2
        if one[: middle * GRAIN] == other[: middle * GRAIN]:
            low = middle
        else:
            high = middle - 1
    return low * GRAIN
