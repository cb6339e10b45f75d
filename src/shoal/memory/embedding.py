"""Texts to unit vectors. `Embedder` is the seam for a learnt model; `HashedEmbedder` needs none and no download.

`HashedEmbedder` is feature hashing (Weinberger et al., arXiv 0902.2206) of words, pairs of words and letter
trigrams, each with a sign from its hash: near-duplicates and shared terms come out close, paraphrases do not.

Invariants: equal texts give equal vectors on every machine; every vector has length 1, that of an empty text included.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.memory.screening import words

DIMENSIONS = 384
PAIR_WEIGHT = 0.7
TRIGRAM_WEIGHT = 0.3


class Embedder(Protocol):
    """Anything that turns texts into unit vectors of `dimensions` numbers."""

    @property
    def dimensions(self) -> int: ...

    @property
    def name(self) -> str:
        """What a store's vectors were made with; another name means that they are made again."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row of length 1 a text."""
        ...


class HashedEmbedder:
    """Feature hashing of words, pairs and letter trigrams."""

    name = "hashed-1"

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        self.dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._one(text) for text in texts]) if texts else np.zeros((0, self.dimensions), np.float32)

    def _one(self, text: str) -> NDArray[np.float32]:
        found = words(text)
        vector = np.zeros(self.dimensions, np.float64)
        self._add(vector, found, 1.0)
        self._add(vector, [f"{a} {b}" for a, b in pairwise(found)], PAIR_WEIGHT)
        padded = [f"^{word}$" for word in found]
        self._add(vector, [w[i : i + 3] for w in padded for i in range(len(w) - 2)], TRIGRAM_WEIGHT)
        length = float(np.linalg.norm(vector))
        if length == 0.0:
            vector[0] = length = 1.0
        return (vector / length).astype(np.float32)

    def _add(self, vector: NDArray[np.float64], features: Sequence[str], weight: float) -> None:
        for feature, count in Counter(features).items():
            code = zlib.crc32(feature.encode(errors="replace"))
            # The parity bit is the sign, the rest the place.
            vector[(code >> 1) % self.dimensions] += (1.0 if code & 1 else -1.0) * weight * (1.0 + math.log(count))
