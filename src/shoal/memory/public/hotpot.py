"""HotpotQA (arXiv 1809.09600): questions that take two paragraphs, with the sentences that support the answer.

The published files (`hotpot_dev_distractor_v1.json` and its like) are one list of objects: `_id`, `question`, `answer`,
`supporting_facts` (title, sentence number), `context` (title, sentences), `type`, `level`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.memory.public.reading import read_whole
from shoal.memory.public.scoring import Fact, Overlap, answers_overlap, exact_match, f1, overlap


class Paragraphs(msgspec.Struct):
    """One question with its ten paragraphs."""

    id: str = msgspec.field(name="_id")
    question: str = ""
    answer: str = ""
    """Empty in the test set."""
    supporting_facts: list[tuple[str, int]] = []
    context: list[tuple[str, list[str]]] = []
    type: str = ""
    level: str = ""

    @property
    def sentences(self) -> dict[Fact, str]:
        """All sentences of its paragraphs."""
        return {(title, n): text for title, sentences in self.context for n, text in enumerate(sentences)}


@dataclass(frozen=True)
class Marks:
    """One question's marks, by the authors' evaluation."""

    em: float
    answer: Overlap
    facts_em: float
    facts: Overlap

    @property
    def joint_em(self) -> float:
        return self.em * self.facts_em

    @property
    def joint_f1(self) -> float:
        """F1 of the products of both precisions and of both recalls."""
        return f1(self.answer.precision * self.facts.precision, self.answer.recall * self.facts.recall)


def read(path: Path, most: int = 0) -> list[Paragraphs]:
    """The questions of a published file, the first `most` (0: all); raises `ConfigError` where it is none."""
    found = read_whole(path, list[Paragraphs])
    return found[:most] if most else found


def score(question: Paragraphs, answer: str, facts: Iterable[Fact]) -> Marks:
    """Marks of an answer and the sentences that are said to support it."""
    said, gold = set(facts), {(title, n) for title, n in question.supporting_facts}
    return Marks(
        em=exact_match(answer, question.answer),
        answer=answers_overlap(answer, question.answer),
        facts_em=float(said == gold),
        facts=overlap(said, gold),
    )
