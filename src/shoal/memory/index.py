"""The k best of many vectors by similarity times weight: an inverted file of our own, scored exactly.

Vectors lie in lists, one for each of about sqrt(n) k-means centroids. A query scores the lists that can hold the best
products, by (centroid similarity + slack) times the list's largest weight, until `scan` vectors were scored: each
score is the exact product in fp32, so only a list that was not looked at can cost recall. Below `TRAIN_FROM` vectors
there is one list and the answer is exact. Weights are a separate array: changing one moves no vector, which is why
this is not a maximum-inner-product graph over w * x (an update there is a removal and an insertion).

Invariants: a key is in one list; a weight of 0 is never returned; `add` and `set_weight` never train; a saved index
that is damaged, or of another size or dimension, is refused, and rebuilt by its owner.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.errors import CapacityError, StorageError

TRAIN_FROM = 16_384
"""Fewer vectors are scanned whole."""

RETRAIN_GROWTH = 4
"""The lists are made anew when there are this many times the vectors they were made for."""

TRAIN_SAMPLE = 65_536
TRAIN_ROUNDS = 6
MAX_LISTS = 4096
SLACK = 0.1
"""How much nearer to the query than its centroid a list's best vector may well be."""

SCAN = 16_384
"""Vectors scored for one query."""

MAX_KEY = 1 << 31
ASSIGN_ROWS = 8192
GROWTH = 1.3
FILES = ("vectors.npy", "keys.npy", "weights.npy", "offsets.npy", "centroids.npy", "position.npy")

Floats = NDArray[np.float32]
T = TypeVar("T", bound=np.generic)


@dataclass
class _List:
    """The vectors nearest to one centroid; the first `size` rows count."""

    vectors: Floats
    keys: NDArray[np.int64]
    weights: Floats
    size: int
    top_weight: float = 0.0
    """No smaller than any weight in it; exact after training or loading."""

    def append(self, key: int, vector: Floats, weight: float) -> int:
        if self.size == len(self.keys):
            # A list that was loaded is a window on a file: growing copies it into memory.
            room = max(16, int(self.size * GROWTH))
            self.vectors = _grown(self.vectors, room)
            self.keys, self.weights = _grown(self.keys, room), _grown(self.weights, room)
        slot = self.size
        self.vectors[slot], self.keys[slot], self.weights[slot] = vector, key, weight
        self.size += 1
        self.top_weight = max(self.top_weight, weight)
        return slot


def _grown(array: NDArray[T], room: int) -> NDArray[T]:
    grown = np.empty((room, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


class VectorIndex:
    """Keys (small non-negative integers) with a unit vector and a weight each."""

    def __init__(self, dimensions: int, *, scan: int = SCAN) -> None:
        self.dimensions, self.scan = dimensions, scan
        self.position = 0
        """For the owner: how far into its events the index has read."""
        self._centroids: Floats = np.zeros((1, dimensions), np.float32)
        self._lists = [_empty_list(dimensions)]
        self._list_of = np.full(1024, -1, np.int32)
        self._slot_of = np.zeros(1024, np.int32)
        self._trained_for = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return 0 <= key < len(self._list_of) and self._list_of[key] >= 0

    @property
    def wants_training(self) -> bool:
        """Whether searching would be quicker with new lists; the owner trains when it has the time."""
        return self._count >= max(TRAIN_FROM, RETRAIN_GROWTH * self._trained_for)

    def add(self, key: int, vector: Floats, weight: float) -> None:
        """Add a key that is not there; its vector has length 1."""
        if not 0 <= key < MAX_KEY or key in self:
            raise CapacityError(f"key {key} is out of range or in the index already.")
        number = int(np.argmax(self._centroids @ vector))
        self._place(key, number, self._lists[number].append(key, vector, weight))
        self._count += 1

    def set_weight(self, key: int, weight: float) -> None:
        """Change the weight of a key that is there."""
        number = int(self._list_of[key])
        assert number >= 0, "the owner knows what it added"
        found = self._lists[number]
        found.weights[self._slot_of[key]] = weight
        found.top_weight = max(found.top_weight, weight)

    def search(
        self, query: Floats, k: int, *, allowed: NDArray[np.bool_] | None = None, scan: int | None = None
    ) -> list[tuple[int, float]]:
        """Keys and products of the best `k` with a positive product, best first.

        Args:
            allowed: by key, which may be returned; keys beyond its end may not.
            scan: vectors to score, where it is not the index's own number.
        """
        tops = np.array([found.top_weight for found in self._lists], np.float32)
        promise = (self._centroids @ query + SLACK) * tops
        budget = scan or self.scan
        keys: list[NDArray[np.int64]] = []
        scores: list[Floats] = []
        for number in np.argsort(-promise):
            found = self._lists[number]
            if budget <= 0 or tops[number] <= 0:
                break
            if found.size:
                keys.append(found.keys[: found.size])
                scores.append((found.vectors[: found.size] @ query) * found.weights[: found.size])
                budget -= found.size
        if not keys:
            return []
        all_keys, all_scores = np.concatenate(keys), np.concatenate(scores)
        if allowed is not None:
            inside = all_keys < len(allowed)
            keep = np.zeros(len(all_keys), np.bool_)
            keep[inside] = allowed[all_keys[inside]]
            all_scores = np.where(keep, all_scores, 0)
        best = np.argpartition(-all_scores, k)[:k] if k < len(all_scores) else np.arange(len(all_scores))
        best = best[np.lexsort((all_keys[best], -all_scores[best]))]
        return [(int(all_keys[i]), float(all_scores[i])) for i in best if all_scores[i] > 0]

    def train(self, seed: int = 0) -> None:
        """Make the lists anew: spherical k-means on a sample, then every vector goes to its nearest centroid."""
        vectors, keys, weights = self._all()
        self.build(vectors, keys, weights, seed)

    def build(self, vectors: Floats, keys: NDArray[np.int64], weights: Floats, seed: int = 0) -> None:
        """Replace everything by these."""
        number_of_lists = 1 if len(keys) < TRAIN_FROM else min(MAX_LISTS, int(len(keys) ** 0.5))
        self._centroids = _kmeans(vectors, number_of_lists, seed)
        nearest = _assign(vectors, self._centroids)
        order = np.argsort(nearest, kind="stable")
        offsets = np.searchsorted(nearest[order], np.arange(number_of_lists + 1))
        slab = np.empty_like(vectors)
        for start in range(0, len(order), ASSIGN_ROWS):
            slab[start : start + ASSIGN_ROWS] = vectors[order[start : start + ASSIGN_ROWS]]
        self._adopt(slab, keys[order], weights[order], offsets)

    def save(self, folder: Path) -> None:
        """Write everything to `folder`, replacing what was there whole or not at all."""
        vectors, keys, weights = self._all()
        aside = folder.with_name(folder.name + ".new")
        old = folder.with_name(folder.name + ".old")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            offsets = np.cumsum([0, *(found.size for found in self._lists)], dtype=np.int64)
            position = np.array([self.position], np.int64)
            arrays: list[NDArray[Any]] = [vectors, keys, weights, offsets, self._centroids, position]
            for name, array in zip(FILES, arrays, strict=True):
                np.save(aside / name, array)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(aside, folder)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"the index {folder} cannot be written: {error.strerror}.", "Make room.") from None

    @classmethod
    def load(cls, folder: Path, dimensions: int, *, scan: int = SCAN) -> VectorIndex | None:
        """The index saved in `folder`, its vectors read when they are first needed; None where there is none to use."""
        try:
            parts = [np.load(folder / name, mmap_mode="c" if name == FILES[0] else None) for name in FILES]
        except (OSError, ValueError, EOFError):
            return None
        vectors, keys, weights, offsets, centroids, position = parts
        count = len(keys)
        kinds = ("float32", "int64", "float32", "int64", "float32", "int64")
        shapes = ((count, dimensions), (count,), (count,), (len(centroids) + 1,), (len(centroids), dimensions), (1,))
        fits = all(
            part.dtype == kind and part.shape == shape for part, kind, shape in zip(parts, kinds, shapes, strict=True)
        )
        if not fits or offsets[0] != 0 or offsets[-1] != count or np.any(np.diff(offsets) < 0):
            return None
        if count and (keys.min() < 0 or keys.max() >= MAX_KEY or len(np.unique(keys)) != count):
            return None
        index = cls(dimensions, scan=scan)
        index._centroids, index.position = centroids, int(position[0])
        index._adopt(vectors, keys, weights, offsets)
        return index

    def _adopt(self, slab: Floats, keys: NDArray[np.int64], weights: Floats, offsets: NDArray[np.int64]) -> None:
        self._count = self._trained_for = len(keys)
        room = max(1024, int(keys.max()) + 1 if len(keys) else 0)
        self._list_of, self._slot_of = np.full(room, -1, np.int32), np.zeros(room, np.int32)
        self._lists = []
        for number, (start, end) in enumerate(pairwise(offsets)):
            part = slice(int(start), int(end))
            top = float(weights[part].max()) if end > start else 0.0
            self._lists.append(_List(slab[part], keys[part], weights[part], int(end - start), top))
            self._list_of[keys[part]] = number
            self._slot_of[keys[part]] = np.arange(end - start)

    def _place(self, key: int, number: int, slot: int) -> None:
        if key >= len(self._list_of):
            room = max(key + 1, int(len(self._list_of) * GROWTH))
            more = room - len(self._list_of)
            self._list_of = np.concatenate([self._list_of, np.full(more, -1, np.int32)])
            self._slot_of = np.concatenate([self._slot_of, np.zeros(more, np.int32)])
        self._list_of[key], self._slot_of[key] = number, slot

    def _all(self) -> tuple[Floats, NDArray[np.int64], Floats]:
        lists = self._lists
        return (
            np.concatenate([found.vectors[: found.size] for found in lists]),
            np.concatenate([found.keys[: found.size] for found in lists]),
            np.concatenate([found.weights[: found.size] for found in lists]),
        )


def _empty_list(dimensions: int) -> _List:
    return _List(np.empty((0, dimensions), np.float32), np.empty(0, np.int64), np.empty(0, np.float32), 0)


def _kmeans(vectors: Floats, number: int, seed: int) -> Floats:
    """Centroids of length 1; one of length 0 where a single list holds everything."""
    if number == 1:
        return np.zeros((1, vectors.shape[1]), np.float32)
    draw = np.random.default_rng(seed)
    sample = vectors[np.sort(draw.choice(len(vectors), min(len(vectors), TRAIN_SAMPLE), replace=False))]
    centroids = sample[draw.choice(len(sample), number, replace=False)].copy()
    for _ in range(TRAIN_ROUNDS):
        nearest = _assign(sample, centroids)
        order = np.argsort(nearest, kind="stable")
        starts = np.searchsorted(nearest[order], np.arange(number))
        filled = np.unique(nearest)
        sums = np.add.reduceat(sample[order], starts[filled], axis=0)
        centroids[filled] = sums
        lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids /= np.maximum(lengths, 1e-12)
    return centroids


def _assign(vectors: Floats, centroids: Floats) -> NDArray[np.int64]:
    """Which centroid each vector is nearest to."""
    nearest = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), ASSIGN_ROWS):
        part = slice(start, start + ASSIGN_ROWS)
        nearest[part] = np.argmax(vectors[part] @ centroids.T, axis=1)
    return nearest
