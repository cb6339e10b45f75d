"""Small memories to test with."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.memory.records import Context, Entry, Provenance, Run, Scope, Trial
from shoal.protocol.chat import Message
from shoal.protocol.episode import Task


def make_entry(
    text: str, *, user: str = "", family: str = "arithmetic", source_task: str = "", ttl_s: float = 0.0
) -> Entry:
    return Entry(
        text=text,
        family=family,
        scope=Scope(user=user),
        source_task=source_task,
        ttl_s=ttl_s,
        provenance=Provenance(rule="manual"),
    )


def make_trial(
    number: int, before: float, after: float, *, family: str = "arithmetic", answers: Sequence[str] = ()
) -> Trial:
    """Sibling number `number`; equal steps and tokens, so that only the rewards count."""
    return Trial(
        task=Task(env=family, id=f"sibling-{number}", seed=number),
        sampling_seed=number,
        model="m",
        config="c",
        without=Run(reward=before, steps=1, tokens=10),
        with_memory=Run(reward=after, steps=1, tokens=10),
        answers=tuple(answers),
    )


def make_context(*, reward: float = 1.0, action: str = "Carry the one.", recalled: Sequence[str] = ()) -> Context:
    return Context(
        task=Task(env="arithmetic", id="t", seed=1),
        messages=(Message(role="user", content="Add the two columns."),),
        actions=(action,),
        truncated=(False,),
        recalled=tuple(recalled),
        model="m",
        config="c",
        reward=reward,
    )


def noisy_trials(effect: float, count: int, seed: int, *, base: float = 0.5) -> list[Trial]:
    """Rewards of 0 or 1: 1 with probability `base` without the memory, `base + effect` with it."""
    draw = random.Random(seed)
    return [make_trial(n, float(draw.random() < base), float(draw.random() < base + effect)) for n in range(count)]
