"""FEVER (arXiv 1803.05355): claims to support or refute, with the sentences of Wikipedia that do.

The published files (`train.jsonl`, `shared_task_dev.jsonl`, …) have a claim a line: `id`, `claim`, `label`, `evidence`
(sets of `[annotation, evidence id, page, sentence]`; page and sentence are null for NOT ENOUGH INFO). The pages are in
`wiki-pages/wiki-*.jsonl` with `id` and `lines` ("NUMBER\\tTEXT\\t…" each); a claim can be judged without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.memory.public.reading import read_lines
from shoal.memory.public.scoring import NOT_ENOUGH, Fact, fever_score

LABELS = ("SUPPORTS", "REFUTES", NOT_ENOUGH)


class Claim(msgspec.Struct):
    """One claim."""

    id: int
    claim: str
    label: str = ""
    """Empty in the blind test set."""
    evidence: list[list[tuple[int | None, int | None, str | None, int | None]]] = []

    @property
    def sets(self) -> list[frozenset[Fact]]:
        """Sets of sentences, each of which is enough."""
        return [
            frozenset((page, number) for _, _, page, number in one if page is not None and number is not None)
            for one in self.evidence
        ]


class _Page(msgspec.Struct):
    id: str
    lines: str = ""


@dataclass(frozen=True)
class Marks:
    """One claim's marks."""

    label: float
    fever: float


def read(path: Path, most: int = 0) -> list[Claim]:
    """The claims of a published file, the first `most` (0: all); raises `ConfigError` where it is none."""
    return read_lines(path, Claim, most)


def sentences(folder: Path, pages: Iterable[str]) -> dict[Fact, str]:
    """The sentences of some pages of the published dump."""
    wanted = set(pages)
    found: dict[Fact, str] = {}
    for path in sorted(folder.glob("wiki-*.jsonl")):
        for page in read_lines(path, _Page):
            if page.id in wanted:
                for line in page.lines.split("\n"):
                    number, _, rest = line.partition("\t")
                    text = rest.partition("\t")[0]
                    if number.isdigit() and text:
                        found[page.id, int(number)] = text
    return found


def score(claim: Claim, label: str, shown: Sequence[Fact]) -> Marks:
    """Marks of a label and the sentences that are said to be its evidence, best first."""
    return Marks(float(label == claim.label), fever_score(label, shown, claim.label, claim.sets))
