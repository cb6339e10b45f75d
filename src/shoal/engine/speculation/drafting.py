"""Who of a batch's sequences drafts, how deep, and what the drafter knows of them.

The drafter's slots are its own. A sequence takes one when it drafts for the first time and leaves it when it ends, and
is told to the drafter only when drafts are asked for: where nobody drafts, nothing is done but choosing a depth of 0.

Invariants: a sequence that may not draft (a grammar, biases, penalties or alternatives change its logits step by step;
or it is sampled with a seed, whose tokens must not depend on what was guessed) never does; before it proposes, the
drafter has been told of every certain token; features that wait are bounded by `FEATURE_TOKENS` a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.sequence import Sequence
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.drafts import Drafts

FEATURE_TOKENS = 512
"""Positions of a sequence whose features are kept until the drafter wants them, the latest: it guesses nearly as well
without the earlier ones."""


class Gammas(Protocol):
    """Says how deep to draft; `planning.speculation.Pacer` is one."""

    def gammas(self, rows: Several[int], others: int = 0) -> list[int]: ...

    def frames(self, rows: int, gamma: int) -> int: ...

    def took(
        self,
        rows: Several[int],
        drafted: Several[int],
        accepted: Several[int],
        draft_s: float,
        verify_s: float,
        delay_s: float = 0.0,
        slowest_s: float = 0.0,
        others: int = 0,
    ) -> None: ...

    def ended(self, row: int) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same γ, and the same frames in flight."""

    gamma: int
    in_flight: int = 1

    def gammas(self, rows: Several[int], others: int = 0) -> list[int]:
        return [self.gamma] * len(rows)

    def frames(self, rows: int, gamma: int) -> int:
        return self.in_flight

    def took(
        self,
        rows: Several[int],
        drafted: Several[int],
        accepted: Several[int],
        draft_s: float,
        verify_s: float,
        delay_s: float = 0.0,
        slowest_s: float = 0.0,
        others: int = 0,
    ) -> None:
        pass

    def ended(self, row: int) -> None:
        pass


@dataclass
class _Known:
    """What the drafter has of a sequence."""

    slot: int
    told: int
    """Tokens of the completion."""


class Drafting:
    """A drafter beside a batch.

    Args:
        tree_width: tokens that the drafter proposes at each depth.
        seeded: let sampled sequences with a seed draft too; their tokens then depend on the drafts as well.
    """

    def __init__(self, drafter: Drafter, gammas: Gammas, *, tree_width: int = 1, seeded: bool = False) -> None:
        self._drafter, self._gammas = drafter, gammas
        self.tree_width = tree_width
        self._seeded = seeded
        self._slots: list[Sequence] = []
        self._known: dict[Sequence, _Known] = {}
        self._numbers: dict[Sequence, int] = {}
        self._next_number = 0
        self._waiting: dict[Sequence, list[Tensor]] = {}
        """Features of the positions before the tokens that the drafter was not told of yet."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers whose incoming hidden states the drafter reads."""
        return self._drafter.depths

    def may(self, sequence: Sequence) -> bool:
        """Whether a rule can answer for this sequence's tokens."""
        params = sequence.request.params
        return sequence.shaper is None and (self._seeded or params.temperature == 0 or params.seed is None)

    def gammas(self, live: Several[Sequence]) -> list[int]:
        """How deep each of them is to draft now; no deeper than what it may still draw, less the target's own token."""
        rows = [s for s in live if self.may(s)]
        if not rows:
            return [0] * len(live)
        found = dict(zip(rows, self._gammas.gammas(self._numbered(rows), len(live) - len(rows)), strict=True))
        return [found.get(s, 0) for s in live]

    def frames(self, rows: int, gamma: int) -> int:
        """Rounds to have in flight together."""
        return self._gammas.frames(rows, gamma)

    def propose(
        self,
        live: Several[Sequence],
        gammas: Several[int],
        beyond: Several[Several[int]],
        *,
        probs: bool,
    ) -> tuple[list[int], Drafts]:
        """Chains or trees, at most `gammas` deep, behind the sequences' tokens and what is taken to follow them.

        Returns:
            For each of the drafts' rows the place of its sequence in `live`, and the drafts.
        """
        for sequence, gamma in zip(live, gammas, strict=True):
            if gamma or sequence in self._known:
                self._tell(sequence)
        place_of = {sequence: place for place, sequence in enumerate(live)}
        places = [place_of[sequence] for sequence in self._slots]
        own = [gammas[place] for place in places]
        params = [sequence.request.params for sequence in self._slots]
        uniforms = torch.tensor([[s.uniform() for _ in range(max(own))] for s in self._slots], dtype=torch.float64)
        ahead = [beyond[place] for place in places] if any(beyond) else ()
        return places, self._drafter.propose(own, params, uniforms, probs=probs, beyond=ahead)

    def observed(self, sequence: Sequence, features_KF: Tensor) -> None:
        """K tokens have become certain; features of the positions before each of them."""
        if not self.may(sequence):
            return
        waiting = self._waiting.setdefault(sequence, [])
        waiting.append(features_KF)
        if sum(map(len, waiting)) > 2 * FEATURE_TOKENS:
            waiting[:] = [torch.cat(waiting)[-FEATURE_TOKENS:].clone()]

    def took(
        self,
        live: Several[Sequence],
        drafted: Several[int],
        accepted: Several[int],
        draft_s: float,
        verify_s: float,
        delay_s: float = 0.0,
        slowest_s: float = 0.0,
    ) -> None:
        """What a round, or a plain step, took and brought."""
        rows = [place for place, sequence in enumerate(live) if self.may(sequence)]
        self._gammas.took(
            self._numbered([live[place] for place in rows]),
            [drafted[place] for place in rows],
            [accepted[place] for place in rows],
            draft_s,
            verify_s,
            delay_s,
            slowest_s,
            len(live) - len(rows),
        )

    def left(self, sequence: Sequence) -> None:
        """A sequence is over."""
        self._waiting.pop(sequence, None)
        if (number := self._numbers.pop(sequence, None)) is not None:
            self._gammas.ended(number)
        if (known := self._known.pop(sequence, None)) is None:
            return
        last = len(self._slots) - 1
        self._drafter.leave(known.slot, last)
        mover = self._slots.pop()
        if mover is not sequence:
            self._slots[known.slot] = mover
            self._known[mover].slot = known.slot

    def _numbered(self, rows: Several[Sequence]) -> list[int]:
        for sequence in rows:
            if sequence not in self._numbers:
                self._numbers[sequence] = self._next_number
                self._next_number += 1
        return [self._numbers[sequence] for sequence in rows]

    def _tell(self, sequence: Sequence) -> None:
        """Let the drafter know all that is certain."""
        features = self._features(sequence) if self.depths else None
        known = self._known.get(sequence)
        if known is None:
            self._known[sequence] = _Known(len(self._slots), len(sequence.ids))
            self._slots.append(sequence)
            text = [*sequence.prompt, *sequence.ids]
            begin = 0 if features is None else len(text) - 1 - len(features)
            self._drafter.begin(len(self._slots) - 1, text[begin:], features)
        elif known.told < len(sequence.ids):
            new = sequence.ids[known.told :]
            self._drafter.took(known.slot, new if features is None else new[-len(features) :], features)
            known.told = len(sequence.ids)

    def _features(self, sequence: Sequence) -> Tensor | None:
        """Those of the positions before the tokens to be told of, or the latest; at the beginning the prompt's too."""
        waiting = self._waiting.pop(sequence, [])
        if sequence not in self._known and sum(map(len, waiting)) == len(sequence.ids) - 1:
            assert sequence.prompt_features is not None
            waiting = [sequence.prompt_features, *waiting]
        return torch.cat(waiting)[-FEATURE_TOKENS:] if waiting else None
