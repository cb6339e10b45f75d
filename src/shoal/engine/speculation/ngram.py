"""Prompt look-up: what followed the last few tokens when they stood in this text before (Saxena 2023; no training).

Worth its while where the answer repeats its question: editing, extraction, quoting, code. Costs next to nothing
elsewhere, because nothing is proposed where nothing matches.

Each n-gram of the text, for n from `shortest` to `longest`, points to its latest endings. A token that becomes certain
adds one entry for each n, and a look-up asks for one n after another, longest first: both take a time that does not
depend on the text's length.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoal.engine.speculation.drafts import ROOT, Drafts
from shoal.protocol.sampling import SamplingParams


class SuffixIndex:
    """One text and where its n-grams ended.

    Args:
        longest, shortest: lengths of the n-grams.
        width: how many endings of each are remembered, the latest.
    """

    def __init__(self, longest: int, shortest: int, width: int) -> None:
        assert 1 <= shortest <= longest and width >= 1
        self._lengths = range(longest, shortest - 1, -1)
        self._width = width
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            # The n-grams that ended before this token are entered now that something follows them.
            end = len(self.ids)
            for length in self._lengths:
                if length <= end:
                    ends = self._ends.setdefault(tuple(self.ids[end - length : end]), [])
                    ends.append(end)
                    del ends[: -self._width]
            self.ids.append(token)

    def continuations(self, count: int, beyond: Sequence[int] = ()) -> list[list[int]]:
        """What followed the longest suffix that occurred before, latest first: up to `width` texts of `count` tokens.

        A continuation that reaches the end of the text goes on with itself: a repeated line is repeated again.

        Args:
            beyond: taken for the text's end, though it may not stay.
        """
        suffix = [*self.ids[-self._lengths[0] :], *beyond]
        for length in self._lengths:
            if length <= len(suffix) and (ends := self._ends.get(tuple(suffix[-length:]))):
                return [self._from(end, count) for end in reversed(ends)]
        return []

    def _from(self, start: int, count: int) -> list[int]:
        found: list[int] = []
        for at in range(start, start + count):
            found.append(self.ids[at] if at < len(self.ids) else found[at - len(self.ids)])
        return found


class NgramDrafter:
    """Looks up what the sequence itself has said before.

    Args:
        longest, shortest: tokens that must match; a short match is wrong more often.
        width: earlier places whose continuations become the branches of a tree; 1 gives chains.
    """

    depths: tuple[int, ...] = ()

    def __init__(self, longest: int = 4, shortest: int = 2, width: int = 1) -> None:
        self._settings = longest, shortest, width
        self._slots: list[SuffixIndex] = []

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        assert slot == len(self._slots)
        self._slots.append(SuffixIndex(*self._settings))
        self._slots[slot].add(ids)

    def propose(
        self,
        gammas: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms_BG: Tensor,
        *,
        probs: bool,
        beyond: Sequence[Sequence[int]] = (),
    ) -> Drafts:
        trees = [
            merged(index.continuations(gamma, more)) if gamma else ([], [])
            for index, gamma, more in zip(self._slots, gammas, beyond or [()] * len(gammas), strict=True)
        ]
        return Drafts.trees([tokens for tokens, _ in trees], [parents for _, parents in trees])

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        self._slots[slot].add(tokens)

    def leave(self, slot: int, last: int) -> None:
        self._slots[slot] = self._slots[last]
        del self._slots[last:]


def merged(texts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Texts as one tree, common beginnings once: tokens and parents, the first text's branch first."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for text in texts:
        parent = ROOT
        for token in text:
            node = known.get((parent, token))
            if node is None:
                node = known[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            parent = node
    return tokens, parents
