"""Which memories fit a query: the index over embeddings, kept level with the store.

Invariants: what the index gives weight to is active in the store, and, where only vouched-for memories are wanted, was
admitted or replayed by this very node; a search shows nothing out of scope or expired; an index that is damaged,
missing or of another embedder is made again from the store, which alone is the state.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.memory.embedding import Embedder
from shoal.memory.evolution import HALF_LIFE_S
from shoal.memory.index import VectorIndex
from shoal.memory.records import Entry, Scope
from shoal.memory.state import Memory
from shoal.memory.store import Store

REFERENCE_US = 1_767_225_600 * 10**6
"""Weights in the index are as of this time (2026): with one half-life for all, ageing changes no order."""

NEIGHBOURS = 8
"""Nearest memories that a new one is compared with."""

SCOPED_EXTRA = 4
"""A search that is held to a scope or family scores this many times the vectors."""


@dataclass(frozen=True)
class Found:
    """One answer of a search."""

    memory: Memory
    similarity: float
    weight: float

    @property
    def score(self) -> float:
        """s(q, m) = sim(q, m) * w(m)."""
        return self.similarity * self.weight


class Retrieval:
    """The index of one store.

    Args:
        folder: where indices are saved, one for each embedder.
        vouched_only: leave out what other nodes admitted until this one has replayed it.
    """

    def __init__(self, store: Store, embedder: Embedder, folder: Path, *, vouched_only: bool) -> None:
        self._store, self._embedder = store, embedder
        self._vouched_only = vouched_only
        store.use_vectors_of(embedder.name)
        self._folder = folder / f"index-{embedder.name}{'-vouched' if vouched_only else ''}"
        loaded = VectorIndex.load(self._folder, embedder.dimensions)
        ahead = loaded is not None and loaded.position > store.position
        self.index = VectorIndex(embedder.dimensions) if loaded is None or ahead else loaded
        self.follow()

    def follow(self) -> None:
        """Bring the index level with the store."""
        # Another process may append meanwhile: what is read below is level with this position at least.
        position = self._store.position
        for number, entry, memory, kept in list(self._store.numbers(self.index.position)):
            weight = indexed_weight(memory) if memory is not None and self.shows(memory) else 0.0
            if number in self.index:
                self.index.set_weight(number, weight)
            elif memory is not None and weight > 0:
                vector = np.frombuffer(kept, "<f4") if kept else self._embedder.embed([memory.entry.text])[0]
                if len(vector) != self._embedder.dimensions:
                    vector, kept = self._embedder.embed([memory.entry.text])[0], None
                if not kept:
                    self._store.set_vector(entry, vector)
                self.index.add(number, vector, weight)
        self.index.position = position

    def shows(self, memory: Memory) -> bool:
        """Whether a memory may be retrieved here."""
        return memory.status == "active" and (not self._vouched_only or self._store.node in memory.vouched)

    def anew(self) -> None:
        """Forget the index, in memory and on disk: a vector tells of the text that it was made of."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.index = VectorIndex(self._embedder.dimensions)
        self.follow()

    def save(self) -> None:
        """Write the index beside the store, its lists made anew where it has grown."""
        if self.index.wants_training:
            self.index.train()
        self.index.save(self._folder)

    def search(self, query: str, k: int, *, family: str = "", scope: Scope | None = None) -> list[Found]:
        """The best memories for `query`, by similarity times weight (`Keeper.search`)."""
        if not self.index:
            return []
        vector = self._embedder.embed([query])[0]
        allowed, scan = None, self.index.scan
        if family or scope is not None:
            shown = self._store.visible(family, scope)
            allowed = np.zeros(max(shown, default=-1) + 1, np.bool_)
            allowed[shown] = True
            scan *= SCOPED_EXTRA
        now_us = time.time_ns() // 1000
        found: list[Found] = []
        for number, product in self.index.search(vector, k, allowed=allowed, scan=scan):
            memory = self._store.by_number(number)
            if memory is not None and (weight := memory.weight_at(now_us)) > 0:
                found.append(Found(memory, product / indexed_weight(memory), weight))
        return found

    def neighbours(self, entry: Entry) -> list[tuple[Memory, float]]:
        """The likeliest duplicates of an entry among active memories, with their similarity."""
        vector = self._embedder.embed([entry.text])[0]
        found = []
        for number, product in self.index.search(vector, NEIGHBOURS):
            memory = self._store.by_number(number)
            if memory is not None and memory.id != entry.id:
                found.append((memory, product / indexed_weight(memory)))
        return found


def indexed_weight(memory: Memory) -> float:
    """w as of `REFERENCE_US`, so that products compare whenever they are asked for."""
    since_s = (max(memory.created_us, memory.last_used_us) - REFERENCE_US) / 1e6
    return memory.weight * math.exp2(min(100.0, max(-100.0, since_s / HALF_LIFE_S)))
