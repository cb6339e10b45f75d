"""The metrics of the public sets, as their authors' scripts compute them. Pure.

    answers (HotpotQA)            exact match and token F1 after lower case, without articles and punctuation
    supporting facts (HotpotQA)   the same on the set of (title, sentence); joint: products of precisions and recalls
    answers (LoCoMo)              token F1, without "and" as well; lists item by item
    evidence (LoCoMo)             recall: share of a question's evidence turns among those retrieved
    claims (FEVER)                accuracy of the label; FEVER score: the right label and, but for NOT ENOUGH INFO, one
                                  whole evidence set among the first five sentences

Deviation: LoCoMo compares stems (Porter); here words are compared as they stand, which scores a little lower.

Invariant: all are in 0..1, and 1 for a perfect prediction that has a word.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ARTICLES_AND = re.compile(r"\b(?:a|an|the|and)\b")
_PUNCTUATION = frozenset(string.punctuation)

CLOSED = ("yes", "no", "noanswer")
"""HotpotQA: an answer that is one of these and another that is not share nothing, whatever their words."""

FEVER_SENTENCES = 5
NOT_ENOUGH = "NOT ENOUGH INFO"

Fact = tuple[str, int]
"""A sentence: the title of its page, and its number."""


class Overlap(NamedTuple):
    """How much of what was given is wanted, and how much of what is wanted was given."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        return f1(self.precision, self.recall)


def f1(precision: float, recall: float) -> float:
    """The harmonic mean."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def overlap(given: Iterable[Hashable], wanted: Iterable[Hashable]) -> Overlap:
    """Of two bags."""
    said, gold = Counter(given), Counter(wanted)
    shared = (said & gold).total()
    return Overlap(shared / max(1, said.total()), shared / max(1, gold.total()))


def normalised(text: str, articles: re.Pattern[str] = _ARTICLES) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(articles.sub(" ", plain).split())


def exact_match(answer: str, right: str) -> float:
    """Whether both say the same."""
    return float(normalised(answer) == normalised(right))


def answers_overlap(answer: str, right: str) -> Overlap:
    """HotpotQA's, of the tokens of two answers."""
    given, wanted = normalised(answer), normalised(right)
    if given != wanted and (given in CLOSED or wanted in CLOSED):
        return Overlap(0.0, 0.0)
    return overlap(given.split(), wanted.split())


def locomo_f1(answer: str, right: str) -> float:
    """LoCoMo's, of the tokens of two answers."""
    said, gold = (normalised(text, _ARTICLES_AND).split() for text in (answer, right))
    return overlap(said, gold).f1


def locomo_list_f1(answer: str, right: str) -> float:
    """LoCoMo's for several sessions: both are lists at commas; of each right item the best of those given, averaged."""
    given = [part.strip() for part in answer.split(",")]
    wanted = [part.strip() for part in right.split(",")]
    return sum(max(locomo_f1(one, item) for one in given) for item in wanted) / len(wanted)


def fever_score(label: str, sentences: Sequence[Fact], right: str, evidence: Iterable[Collection[Fact]]) -> float:
    """1 where the label is right and the evidence holds one whole set, or none is asked for."""
    if label != right:
        return 0.0
    if right == NOT_ENOUGH:
        return 1.0
    shown = set(sentences[:FEVER_SENTENCES])
    return float(any(set(whole) <= shown for whole in evidence))


def recall_of(found: Iterable[str], right: Collection[str]) -> float:
    """Share of `right` among `found`; 1 where nothing is asked for."""
    wanted = set(right)
    return len(wanted & set(found)) / len(wanted) if wanted else 1.0
