"""Speculative decoding inside continuous batching: each live sequence with its own γ and accept length, in one pass.

A round: choose γ for each sequence, let the drafter propose, compute newest token and drafts of all sequences in one
pass, let the rule accept (`verify`), cut the cache to what stayed, tell drafter and chooser. A sequence without drafts
takes a plain step in the same pass; where nobody drafts, the batcher takes its plain step (`round` gives nothing).

Over a pipeline several rounds may be in flight: a *frame* is sent before the one before it has answered, on the guess
that all of that one's drafts stay and that the drafter also knows the token which the target adds.

    certain text ──▶ frame 1: root, drafts ──▶ frame 2: root (guessed), drafts ──▶ …      answers come in this order

A frame's place for a sequence is *refuted* when the frame before took another turn; nothing of it is used. The next
frame begins behind what is certain, and its keys overwrite the refuted ones, because stages compute in order.

Invariants: before a round a sequence's cache holds all its tokens but the newest, and nothing that was refused counts;
a pass is no wider than the cache's budget allows; under a lossless rule greedy output is the target's
own, whatever the drafter says (up to near-ties in the logits); frames in flight are of the present rows: whoever
changes rows calls `forget` first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.cache import KVCache
from shoal.engine.features import Passed
from shoal.engine.model import Decoder
from shoal.engine.sequence import Sequence
from shoal.engine.speculation.drafting import Drafting
from shoal.engine.speculation.drafts import PADDING, Drafts
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.verify import Verdict, verify
from shoal.errors import ConfigError
from shoal.protocol.stage import MAX_IN_FLIGHT


@dataclass(frozen=True)
class Round:
    """What one round took and brought."""

    gammas: tuple[int, ...]
    drafted: tuple[int, ...]
    """Depth of each sequence's drafts."""
    accepted: tuple[int, ...]
    draft_s: float
    verify_s: float
    """Without what links took."""
    delay_s: float
    ahead: bool
    """Sent before the round before it had answered."""


@dataclass(frozen=True)
class Answers:
    """What a round says: tokens for those who drafted, logits for the others."""

    verdicts: tuple[tuple[Sequence, Verdict], ...] = ()
    others: tuple[Sequence, ...] = ()
    logits: Tensor | None = None
    """Of the others, [B, V]."""


class Room(Protocol):
    """The cache's rows as their batcher shares them out."""

    def fits(self, longest: int) -> bool:
        """Whether every row may have so many positions."""

    def reserve(self, longest: int) -> None:
        """Give every row so many positions."""


@dataclass(eq=False)
class _Place:
    """One sequence's part in a frame."""

    sequence: Sequence
    length: int
    """Tokens of its completion when the frame's root is the newest."""
    root: int
    gamma: int
    drafts: tuple[int, ...] = ()
    refuted: bool = False


@dataclass(eq=False)
class _Frame:
    places: list[_Place]
    """In the order of the cache's slots."""
    rows: list[int]
    """The place of each row of `drafts`."""
    drafts: Drafts
    land: Callable[[], Passed | None]
    void: Callable[[], None]
    draft_s: float
    ahead: bool


class Speculation:
    """A drafter, a rule and what is in flight, beside one batcher.

    Args:
        clock: seconds.

    Raises:
        ConfigError: the rule can't judge what the drafter proposes.
    """

    def __init__(
        self,
        drafting: Drafting,
        rule: Rule,
        *,
        on_round: Callable[[Round], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if isinstance(rule, Fly) and drafting.tree_width > 1:
            raise ConfigError("the rule fly judges chains, and the drafter gives trees.", "Use a tree width of 1.")
        self._drafting, self.rule = drafting, rule
        self._on_round, self._clock = on_round, clock
        self._frames: deque[_Frame] = deque()
        self.rounds = 0
        """Of all sequences that drafted."""
        self.drafted = 0
        self.accepted = 0

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers whose incoming hidden states are to be kept for the drafter."""
        return self._drafting.depths

    def round(self, model: Decoder, cache: KVCache, live: list[Sequence], room: Room) -> Answers | None:
        """The next round's answers; nothing where a plain step does as well."""
        if not self._frames:
            frame = self._launch(model, cache, live, room)
            if frame is None:
                return None
            self._frames.append(frame)
        if self._drafting.tree_width == 1:
            self._go_ahead(model, cache, live, room)
        return self._land(model, cache, live)

    def stepped(self, members: Several[Sequence], passed: Passed, sampling_s: float) -> None:
        """A plain step has given each of them one token."""
        if (features_BTF := passed.features_BTF) is not None:
            for row, sequence in enumerate(members):
                self._drafting.observed(sequence, features_BTF[row])
        none = [0] * len(members)
        took_s = passed.compute_s + sampling_s
        self._drafting.took(members, none, none, 0.0, took_s, passed.delay_s, passed.slowest_s)

    def forget(self) -> None:
        """What is in flight will not count."""
        while self._frames:
            self._frames.pop().void()

    def left(self, sequence: Sequence) -> None:
        """A sequence is over."""
        self._drafting.left(sequence)

    def _go_ahead(self, model: Decoder, cache: KVCache, live: list[Sequence], room: Room) -> None:
        """Send frames on guesses, as many as are worth it."""
        deepest = max(place.gamma for place in self._frames[0].places)
        wanted = min(MAX_IN_FLIGHT, self._drafting.frames(len(live), deepest))
        while len(self._frames) < wanted:
            frame = self._launch(model, cache, live, room, ahead=True)
            if frame is None:
                return
            self._frames.append(frame)

    def _launch(
        self, model: Decoder, cache: KVCache, live: list[Sequence], room: Room, *, ahead: bool = False
    ) -> _Frame | None:
        """Draft, and send the pass on its way; nothing where nobody drafts, or where not all could go ahead."""
        last = self._frames[-1].places if ahead else []
        tails = {place.sequence: place for place in last if not place.refuted}
        if ahead and not (tails and all(map(self._drafting.may, live))):
            return None
        # Of a sequence that goes ahead: its tokens when everything in flight has stayed, the next root included.
        lengths = [t.length + len(t.drafts) + 1 if (t := tails.get(s)) else len(s.ids) for s in live]
        left = [s.request.params.max_tokens - length for s, length in zip(live, lengths, strict=True)]
        if min(left) < 1:
            return None
        start = [s.prompt_length + length - 1 for s, length in zip(live, lengths, strict=True)]
        gammas = [min(gamma, each - 1) for gamma, each in zip(self._drafting.gammas(live), left, strict=True)]
        most = max(gammas)
        while most and not room.fits(max(start) + 1 + most * self._drafting.tree_width):
            most -= 1
        if not most:
            return None
        gammas = [min(gamma, most) for gamma in gammas]
        began = self._clock()
        guesses = [int(s in tails) for s in live]
        beyond = [self._in_flight(s) if guess else () for s, guess in zip(live, guesses, strict=True)]
        asked = [gamma + guess for gamma, guess in zip(gammas, guesses, strict=True)]
        probs = isinstance(self.rule, Semantic)
        rows, drafts = self._drafting.propose(live, asked, beyond, probs=probs)
        roots = [s.ids[-1] for s in live]
        if ahead:
            cut = [guesses[place] for place in rows]
            if any(size < skipped for size, skipped in zip(drafts.sizes, cut, strict=True)):
                return None
            for row, place in enumerate(rows):
                if guesses[place]:
                    roots[place] = int(drafts.tokens_BN[row, 0])
            drafts = drafts.behind(cut)
        if not drafts.width:
            return None
        drafted = self._clock()
        places = [
            _Place(s, length, root, gamma) for s, length, root, gamma in zip(live, lengths, roots, gammas, strict=True)
        ]
        for row, size in enumerate(drafts.sizes):
            places[rows[row]].drafts = tuple(drafts.tokens_BN[row, :size].tolist())
        whole = _of_batch(drafts, rows, len(live))
        room.reserve(max(start) + 1 + drafts.width)
        land, void = model.launch(
            torch.cat((torch.tensor(roots)[:, None], whole.tokens_BN), dim=1).to(model.device),
            torch.tensor(start, device=model.device),
            cache,
            adapters=[s.adapter for s in live],
            parents_BN=None if whole.are_chains else whole.parents_BN,
            depths=self.depths,
        )
        return _Frame(places, rows, drafts, land, void, drafted - began, ahead)

    def _in_flight(self, sequence: Sequence) -> list[int]:
        """What is taken to follow a sequence's tokens by the frames that are under way."""
        found: list[int] = []
        for frame in self._frames:
            place = next(p for p in frame.places if p.sequence is sequence)
            if not place.refuted:
                found += ([place.root] if place.length > len(sequence.ids) else []) + list(place.drafts)
        return found

    def _land(self, model: Decoder, cache: KVCache, live: list[Sequence]) -> Answers:
        """The first frame's answers."""
        frame = self._frames.popleft()
        passed = frame.land()
        if passed is None:  # its ring broke: everything in flight is lost, and the next round sends it anew
            self.forget()
            return Answers()
        began = self._clock()
        places = frame.places
        assert [place.sequence for place in places] == live
        kept = [(row, at) for row, at in enumerate(frame.rows) if not places[at].refuted]
        judged = [at for _, at in kept]
        others = [at for at, place in enumerate(places) if at not in frame.rows and not place.refuted]
        drafts = frame.drafts.select([row for row, _ in kept])
        params = [places[at].sequence.request.params for at in judged]
        uniforms = torch.tensor(
            [[places[at].sequence.uniform() for _ in range(drafts.width + 1)] for at in judged], dtype=torch.float64
        )
        hidden = passed.hidden_BTH
        found = verify(self.rule, model.logits(hidden[judged]), drafts, params, uniforms)
        logits = model.logits(hidden[others, 0]) if others else None
        depths = drafts.depths
        verdicts = dict(zip(judged, found, strict=True))
        drafted, accepted = [0] * len(live), [0] * len(live)
        for at, depth in zip(judged, depths, strict=True):
            place, nodes = places[at], verdicts[at].nodes
            start = place.sequence.length + 1
            cache.settle(at, start, nodes)
            text = (*place.sequence.prompt, *place.sequence.ids, *verdicts[at].tokens)
            cache.holds(at, text[:-1])
            drafted[at], accepted[at] = depth, len(nodes)
            if passed.features_BTF is not None:
                self._drafting.observed(place.sequence, passed.features_BTF[at, [0, *(n + 1 for n in nodes)]])
            self._refute(place.sequence, verdicts[at])
            if depth:
                self.rounds += 1
                self.drafted += depth
                self.accepted += len(nodes)
        for at in others:
            self._refute(places[at].sequence, None)
            if passed.features_BTF is not None:
                self._drafting.observed(places[at].sequence, passed.features_BTF[at, :1])
        self._drop_refuted()
        took_s = passed.compute_s + self._clock() - began
        self._drafting.took(live, drafted, accepted, frame.draft_s, took_s, passed.delay_s, passed.slowest_s)
        if self._on_round is not None:
            gammas = tuple(place.gamma for place in places)
            times = frame.draft_s, took_s, passed.delay_s
            self._on_round(Round(gammas, tuple(drafted), tuple(accepted), *times, frame.ahead))
        return Answers(
            tuple((places[at].sequence, verdicts[at]) for at in judged),
            tuple(places[at].sequence for at in others),
            logits,
        )

    def _refute(self, sequence: Sequence, verdict: Verdict | None) -> None:
        """Of what is in flight for a sequence, all falls with the first guess that was wrong, or is not known yet."""
        length = len(sequence.ids) + len(verdict.tokens) if verdict is not None else 0
        for frame in self._frames:
            place = next(p for p in frame.places if p.sequence is sequence)
            if place.refuted:
                continue
            if verdict is not None and place.length == length and place.root == verdict.tokens[-1]:
                return
            place.refuted = True

    def _drop_refuted(self) -> None:
        """Frames of which nothing counts are not waited for."""
        standing = [frame for frame in self._frames if not all(place.refuted for place in frame.places)]
        for frame in self._frames:
            if frame not in standing:
                frame.void()
        self._frames = deque(standing)


def _of_batch(drafts: Drafts, rows: list[int], batch: int) -> Drafts:
    """Drafts in the rows of a batch; the other rows have none."""
    tokens_BN = torch.zeros(batch, drafts.width, dtype=torch.int64)
    parents_BN = torch.full((batch, drafts.width), PADDING, dtype=torch.int64)
    tokens_BN[rows], parents_BN[rows] = drafts.tokens_BN, drafts.parents_BN
    return Drafts(tokens_BN, parents_BN)
