"""Okapi BM25 (Robertson & Zaragoza 2009, The Probabilistic Relevance Framework, section 3.2). Pure.

score(d, q) = Σ_{t in q} idf(t) · f(t, d) · (k1 + 1) / (f(t, d) + k1 · (1 − b + b · |d| / avgdl))
idf(t) = ln(1 + (N − n(t) + 0.5) / (n(t) + 0.5))
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

K1 = 1.2
B = 0.75

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """A text's terms."""
    return _WORD.findall(text.casefold())


class Bm25:
    """An index of texts, asked by `best`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._lengths: list[int] = []
        for number, text in enumerate(texts):
            counts = Counter(words(text))
            self._lengths.append(counts.total())
            for term, count in counts.items():
                self._postings[term].append((number, count))
        self._mean_length = sum(self._lengths) / max(1, len(self._lengths)) or 1.0

    def best(self, query: str, count: int) -> list[tuple[int, float]]:
        """The numbers and scores of the `count` best texts, best first; those without any term are left out."""
        scores: dict[int, float] = defaultdict(float)
        for term in set(words(query)):
            postings = self._postings.get(term, [])
            idf = math.log(1 + (len(self._lengths) - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, f in postings:
                norm = 1 - B + B * self._lengths[number] / self._mean_length
                scores[number] += idf * f * (K1 + 1) / (f + K1 * norm)
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:count]
