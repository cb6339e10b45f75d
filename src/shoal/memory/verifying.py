"""Before another node's memory is used here: is its admission true?

    audit     its kept trials must give its numbers and its verdict                    (no model)
    rerun     some of those trials, chosen by chance, must end as it says              (same weights, greedy)
    replay    trials of this node's own, fresh tasks and seeds, must show that it helps

A rerun that ends otherwise is a lie, or another build: what differs is counted, and one difference in reward is enough
to fall back to trials of one's own, which nobody else can have made up. A claim that those do not bear out is undone,
for everybody; where they leave it open, the memory stays unseen here, and can be tried again.

Invariants: a memory is vouched for only after this node ran trials of it, or of all that it follows from; what a
reader is shown with `vouched_only` has passed this; what is made up of whole cloth passes with probability at most
`LEVEL`, because the own trials are an anytime-valid test of "it does not help".
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from dataclasses import dataclass
from typing import Literal

from shoal.memory.admission import decide, evidence, gain
from shoal.memory.events import Decided, Event, Vouched
from shoal.memory.keeper import Keeper
from shoal.memory.records import Trial
from shoal.memory.replay import ReplayVoid
from shoal.memory.state import Memory
from shoal.memory.trials import Arena

LEVEL = 0.05
"""How often a memory that does not help is vouched for, at most."""

RERUNS = 4
"""Of its kept trials, where the same weights are here and it was sampled greedily."""

FRESH = 200
"""Trials of this node's own, at most."""


@dataclass(frozen=True)
class Verified:
    """What became of a claim."""

    verdict: Literal["vouched", "false", "open"]
    reason: str
    num_trials: int = 0


async def verify(
    keeper: Keeper,
    arena: Arena,
    memory: Memory,
    *,
    reruns: int = RERUNS,
    fresh: int = FRESH,
    parallel: int = 8,
    rng: random.Random | None = None,
) -> Verified:
    """Check an active memory that another node admitted, and vouch for it or undo the claim."""
    if keeper.store.node in memory.vouched:
        return Verified("vouched", "known")
    event = next((e for e in keeper.store.history(memory) if e.id == memory.admission), None)
    if event is None or not isinstance(event.body, Decided):
        return Verified("open", "its decision is not here")
    if wrong := keeper.audit(event):
        return _undone(keeper, event, wrong)
    if event.body.members and event.body.entry not in event.body.members:
        return _abstract_of(keeper, memory, event.body)
    if event.body.members and _all_vouched(keeper, memory, event.body):
        keeper.vouch(memory.id, 0)
        return Verified("vouched", "what was merged is vouched for")
    kept, _ = evidence(memory.entry, keeper.store.trials(memory).values())
    same = [trial for trial in kept if (trial.model, trial.config) == (arena.model, arena.config)]
    if same and arena.params.temperature == 0:
        chosen = (rng or random.Random()).sample(same, min(reruns, len(same)))
        if await _all_alike(arena, memory, chosen):
            keeper.vouch(memory.id, len(chosen))
            return Verified("vouched", "its trials end as it says", len(chosen))
    return await _tried_here(keeper, arena, memory, event, fresh, parallel)


def _undone(keeper: Keeper, event: Event, reason: str, num_trials: int = 0) -> Verified:
    keeper.undo([event.id])
    return Verified("false", reason, num_trials)


def _abstract_of(keeper: Keeper, memory: Memory, claim: Decided) -> Verified:
    """An abstract form is as good as what it was made of."""
    origins = [keeper.store.memory(member) for member in claim.members]
    if all(origin is not None and keeper.store.node in origin.vouched for origin in origins):
        keeper.vouch(memory.id, 0)
        return Verified("vouched", "what it was made of is vouched for")
    return Verified("open", "what it was made of is not vouched for yet")


def _all_vouched(keeper: Keeper, memory: Memory, claim: Decided) -> bool:
    """Whether this node stands by every admission that a merge has pooled."""
    own, history = keeper.store.node, keeper.store.history(memory)
    stood_by = {e.body.admission for e in history if isinstance(e.body, Vouched) and e.node == own}
    pooled = [
        event
        for event in history
        if isinstance(event.body, Decided)
        and event.body.accepted
        and not event.body.members
        and event.body.entry in claim.members
    ]
    return bool(pooled) and all(event.node == own or event.id in stood_by for event in pooled)


async def _all_alike(arena: Arena, memory: Memory, chosen: list[Trial]) -> bool:
    """Whether trials, run again, earn what they say with the tokens that they say."""
    try:
        again = await asyncio.gather(*(arena.rerun(memory.entry, trial) for trial in chosen))
    except ReplayVoid:
        return False
    return bool(chosen) and all(one == trial for one, trial in zip(again, chosen, strict=True))


async def _tried_here(
    keeper: Keeper, arena: Arena, memory: Memory, event: Event, fresh: int, parallel: int
) -> Verified:
    policy = dataclasses.replace(keeper.policy, max_trials=max(fresh, keeper.policy.min_trials))
    gains: list[float] = []
    number = 0
    while True:
        numbers, number = range(number, number + parallel), number + parallel
        found = await asyncio.gather(
            *(arena.run(memory.entry, keeper.store.node, n) for n in numbers), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, ReplayVoid):
                raise one
        trials = [one for one in found if isinstance(one, Trial)]
        if not trials:
            return Verified("open", "no trial of it could be run here", len(gains))
        gains += [gain(trial, policy) for trial in evidence(memory.entry, trials)[0]]
        decision = decide(gains, level=LEVEL, policy=policy)
        if decision.verdict == "accept":
            keeper.vouch(memory.id, len(gains))
            return Verified("vouched", "it helps here, too", len(gains))
        if decision.reason == "futile":
            return _undone(keeper, event, f"{len(gains)} trials here do not bear it out", len(gains))
        if decision.verdict == "reject" or number >= fresh:
            return Verified("open", f"{len(gains)} trials here leave it open", len(gains))
