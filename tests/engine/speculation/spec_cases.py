"""What the tests of speculative decoding share."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from engine_cases import VOCABULARY
from torch import Tensor

from shoal.engine.speculation.drafts import ROOT, Drafts
from shoal.protocol.sampling import SamplingParams


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p of Pearson's test; what is expected less than five times is counted together."""
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    common = expected >= 5
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    seen, wanted = seen[wanted > 0].double(), wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2))


class Oracle:
    """Drafts what plain decoding is known to give, mixed with errors: every accept length occurs, on chains and trees.

    Args:
        texts: by prompt, its completion.
        error: chance that a draft is spoilt.
    """

    depths: tuple[int, ...] = ()

    def __init__(self, texts: dict[tuple[int, ...], tuple[int, ...]], error: float, width: int) -> None:
        self._texts, self._error, self._width = texts, error, width
        self._slots: list[list[int]] = []
        self._known: list[list[int]] = []
        self._random = random.Random(3)

    def begin(self, slot: int, ids: Sequence[int], features_TF: Tensor | None) -> None:
        prompt = max((known for known in self._texts if tuple(ids[: len(known)]) == known), key=len)
        self._slots.append(list(ids))
        self._known.append([*prompt, *self._texts[prompt]])

    def propose(
        self,
        gammas: Sequence[int],
        params: Sequence[SamplingParams],
        uniforms_BG: Tensor,
        *,
        probs: bool,
        beyond: Sequence[Sequence[int]] = (),
    ) -> Drafts:
        rows, parents = [], []
        for certain, more, known, gamma in zip(
            self._slots, beyond or [()] * len(gammas), self._known, gammas, strict=True
        ):
            ids = [*certain, *more]
            tokens: list[int] = []
            above: list[int] = []
            parent = ROOT
            for right in known[len(ids) : len(ids) + gamma]:
                siblings = [(right + n) % VOCABULARY for n in range(self._width)]
                if self._random.random() < self._error:
                    siblings = [(token + 1) % VOCABULARY for token in siblings]
                self._random.shuffle(siblings)
                first = len(tokens)
                tokens += siblings
                above += [parent] * len(siblings)
                parent = first + (siblings.index(right) if right in siblings else 0)
            rows.append(tokens)
            parents.append(above)
        return Drafts.trees(rows, parents)

    def took(self, slot: int, tokens: Sequence[int], features_KF: Tensor | None) -> None:
        self._slots[slot] += tokens

    def leave(self, slot: int, last: int) -> None:
        for each in (self._slots, self._known):
            each[slot] = each[last]
            del each[last:]
