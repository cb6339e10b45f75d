"""Speculative decoding on one machine: rows join and leave between rounds, each with its own γ and accept length.

A round: choose γ for each row (`Gammas`), let the drafter propose, compute root and drafts of all rows in one pass of
the target, let the rule accept (`verify`), cut the cache to what stayed, tell drafter and chooser. The root is the
newest certain token: it is not in the cache yet, so a row without drafts does a plain step in the same pass.

Invariants: before a round row i's cache holds all its tokens but the newest, and nothing that was refused counts; a
row is admitted only if prompt, all tokens it may draw and a round's drafts fit the cache beside what is alive; under
a lossless rule greedy output is the target's own, whatever the drafter says (up to near-ties in the logits).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from shoal.engine.model import Decoder
from shoal.engine.speculation.cache import RoundCache
from shoal.engine.speculation.drafter import Drafter
from shoal.engine.speculation.drafts import Drafts
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.verify import Verdict, verify
from shoal.errors import CapacityError
from shoal.protocol.sampling import SampleRequest


class Gammas(Protocol):
    """Says how deep to draft; `planning.speculation.Pacer` is one."""

    def gammas(self, rows: Sequence[int]) -> list[int]: ...

    def took(
        self, rows: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], draft_s: float, verify_s: float
    ) -> None: ...

    def ended(self, row: int) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same γ."""

    gamma: int

    def gammas(self, rows: Sequence[int]) -> list[int]:
        return [self.gamma] * len(rows)

    def took(
        self, rows: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], draft_s: float, verify_s: float
    ) -> None:
        pass

    def ended(self, row: int) -> None:
        pass


@dataclass(frozen=True)
class Speculated:
    """One request's outcome."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    rounds: int
    """Passes of the target after the prompt's."""
    drafted: int
    """Depth of the drafts, over all rounds."""
    accepted: int
    lossy: bool
    """Whether the rule may have changed what the target would have said."""


@dataclass(frozen=True)
class Round:
    """What one round took and brought, over all rows."""

    rows: int
    gammas: tuple[int, ...]
    drafted: tuple[int, ...]
    """Depth of each row's drafts."""
    accepted: tuple[int, ...]
    draft_s: float
    verify_s: float


@dataclass(eq=False)
class _Row:
    number: int
    request: SampleRequest
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: Literal["", "stop", "length"] = ""

    def __post_init__(self) -> None:
        self.random = random.Random(self.request.params.seed)

    @property
    def filled(self) -> int:
        return len(self.request.prompt_ids) + len(self.ids) - 1

    @property
    def left(self) -> int:
        return self.request.params.max_tokens - len(self.ids)

    def take(self, verdict: Verdict, end_ids: frozenset[int]) -> int:
        """Add tokens up to an end; gives how many."""
        for count, (token, logprob) in enumerate(zip(verdict.tokens, verdict.logprobs, strict=True), 1):
            self.ids.append(token)
            self.logprobs.append(logprob)
            if token in end_ids:
                self.finish = "stop"
            elif not self.left:
                self.finish = "length"
            if self.finish:
                return count
        return len(verdict.tokens)


class Speculator:
    """A target, a drafter and a rule, decoding requests.

    Args:
        cache: of the target's layers.
        end_ids: tokens that end a completion.
        max_nodes: most drafts of one row in one round, for admission.
        clock: seconds, for the chooser.
    """

    def __init__(
        self,
        target: Decoder,
        cache: RoundCache,
        drafter: Drafter,
        rule: Rule,
        gammas: Gammas,
        *,
        end_ids: frozenset[int] = frozenset(),
        max_nodes: int = 64,
        on_round: Callable[[Round], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._cache, self._drafter, self._rule, self._gammas = target, cache, drafter, rule, gammas
        self._end_ids, self._max_nodes = end_ids, max_nodes
        self._on_round, self._clock = on_round, clock
        self._live: list[_Row] = []

    @torch.inference_mode()
    def run(self, requests: Sequence[SampleRequest]) -> list[Speculated]:
        """Complete all requests; rows join as others leave.

        Raises:
            CapacityError: a request can never fit the cache.
        """
        rows = [_Row(number, request) for number, request in enumerate(requests)]
        for row in rows:
            if not self._cache.fits(1, self._most(row)):
                raise CapacityError(
                    f"a request of {self._most(row)} tokens with its drafts does not fit the cache.",
                    "Shorten it, or give the cache more memory.",
                )
        waiting = deque(rows)
        while waiting or self._live:
            while waiting and self._cache.fits(len(self._live) + 1, max(map(self._most, [*self._live, waiting[0]]))):
                self._join(waiting.popleft())
            if self._live:
                self._round()
        return [
            Speculated(
                tuple(row.ids),
                tuple(row.logprobs),
                "stop" if row.finish == "stop" else "length",
                row.rounds,
                row.drafted,
                row.accepted,
                self._rule.lossy,
            )
            for row in rows
        ]

    def _most(self, row: _Row) -> int:
        return len(row.request.prompt_ids) + row.request.params.max_tokens + self._max_nodes

    def _join(self, row: _Row) -> None:
        """Compute the prompt, and draw the first token from it."""
        slot = len(self._live)
        self._live.append(row)
        self._cache.reserve(len(self._live), max(map(self._most, self._live)), slot)
        prompt = torch.tensor([row.request.prompt_ids], device=self._target.device)
        observed = _Features(self._drafter.depths)
        start_B = torch.zeros(1, dtype=torch.int64, device=self._target.device)
        hidden = self._target.forward(prompt, start_B, self._cache, slot, observe=observed)
        logits = self._target.logits(hidden[:, -1:])
        u_BT = torch.tensor([[row.random.random()]], dtype=torch.float64)
        verdict = verify(self._rule, logits, Drafts.chains([[]]), [row.request.params], u_BT)[0]
        row.take(verdict, self._end_ids)
        features = observed.rows()
        self._drafter.begin(slot, [*row.request.prompt_ids, *row.ids], None if features is None else features[0])
        if row.finish:
            self._leave(slot)

    def _round(self) -> None:
        live = self._live
        params = [row.request.params for row in live]
        numbers = [row.number for row in live]
        # The target adds a token of its own, so a row never needs more drafts than one less than it may still draw.
        gammas = [min(g, row.left - 1) for g, row in zip(self._gammas.gammas(numbers), live, strict=True)]
        u_BG = self._uniforms(max(gammas))
        began = self._clock()
        wants_probs = isinstance(self._rule, Semantic)
        drafts = self._drafter.propose(gammas, params, u_BG, probs=wants_probs) if max(gammas) else _none(len(live))
        assert drafts.width <= self._max_nodes, "a round's drafts are bounded by max_nodes"
        drafted = self._clock()
        x_BT = torch.cat((torch.tensor([[row.ids[-1]] for row in live]), drafts.tokens_BN), dim=1)
        start_B = torch.tensor([row.filled for row in live], device=self._target.device)
        tree_BTT = None if drafts.are_chains else drafts.ancestors_BTT().to(self._target.device)
        observed = _Features(self._drafter.depths)
        hidden = self._target.forward(
            x_BT.to(self._target.device), start_B, self._cache, tree_BTT=tree_BTT, observe=observed
        )
        verdicts = verify(self._rule, self._target.logits(hidden), drafts, params, self._uniforms(drafts.width + 1))
        verified = self._clock()
        depths = _depths(drafts)
        features_BTF = observed.rows()
        for slot, (row, verdict, depth) in enumerate(zip(live, verdicts, depths, strict=True)):
            start, nodes = row.filled + 1, verdict.nodes
            count = row.take(verdict, self._end_ids)
            row.rounds, row.drafted, row.accepted = row.rounds + 1, row.drafted + depth, row.accepted + len(nodes)
            self._cache.settle(slot, start, nodes)
            at = [0, *(node + 1 for node in nodes)][:count]
            features = None if features_BTF is None else features_BTF[slot, at]
            self._drafter.took(slot, verdict.tokens[:count], features)
        accepted = [len(verdict.nodes) for verdict in verdicts]
        self._gammas.took(numbers, depths, accepted, drafted - began, verified - drafted)
        if self._on_round is not None:
            times = drafted - began, verified - drafted
            self._on_round(Round(len(live), tuple(gammas), tuple(depths), tuple(accepted), *times))
        for slot in range(len(live) - 1, -1, -1):
            if live[slot].finish:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        """A row is over; the last one moves into its place."""
        last = len(self._live) - 1
        self._gammas.ended(self._live[slot].number)
        if slot != last:
            self._cache.copy(last, slot, self._live[last].filled)
            self._live[slot] = self._live[last]
        self._live.pop()
        self._drafter.leave(slot, last)

    def _uniforms(self, count: int) -> Tensor:
        """Each row's own next numbers, [B, count]."""
        return torch.tensor([[row.random.random() for _ in range(count)] for row in self._live], dtype=torch.float64)


class _Features:
    """Gathers hidden states during a pass."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        self._depths = depths
        self._seen: dict[int, Tensor] = {}

    def __call__(self, layer: int, hidden_BTH: Tensor) -> None:
        if layer in self._depths:
            self._seen[layer] = hidden_BTH

    def rows(self) -> Tensor | None:
        """[B, T, F]; nothing where no depth was asked for."""
        return torch.cat([self._seen[depth] for depth in self._depths], dim=-1) if self._depths else None


def _none(batch: int) -> Drafts:
    return Drafts.chains([[] for _ in range(batch)])


def _depths(drafts: Drafts) -> list[int]:
    """Of each row's deepest node."""
    deepest = drafts.ancestors_BTT().sum(dim=-1).amax(dim=-1) - 1
    found: list[int] = deepest.tolist()
    return found
