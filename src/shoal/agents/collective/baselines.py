"""What a collective is compared with, on the same problem: one model asked once, one asked as often as the collective's
tokens allow, and one scheduler that hands out all parts.

    direct              the problem to one model, once
    self-consistency    the problem to one model until it has used the collective's tokens; the majority wins
    central             one plan by one writer; the scheduler gives every step away itself and takes every result back

Invariants: the central scheduler uses the same experts, ledger, leases and hand-overs, so what it lacks is only what is
claimed for the collective: several planners, the vote, and that nobody is in charge. When it dies, so does the problem.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.agents.collective.answers import canonical
from shoal.agents.collective.chain import Chain
from shoal.agents.collective.commissions import checked
from shoal.agents.collective.node import CollectiveNode
from shoal.agents.collective.work import Expert, NoChain, StepFailed, SubTask, Work, Writer
from shoal.protocol.codec import decode
from shoal.protocol.collective import StepDone

MAX_SAMPLES = 64


@dataclass(frozen=True)
class Tried:
    """How one method did."""

    method: str
    answer: str | None
    tokens: int
    seconds: float
    samples: int = 1
    reason: str = ""
    """Why there is no answer."""


async def direct(expert: Expert, problem: str) -> Tried:
    """Ask one model once."""
    began = time.monotonic()
    work = await _try(expert, problem)
    seconds = time.monotonic() - began
    if work is None:
        return Tried("direct", None, 0, seconds, reason="the model gives no answer")
    return Tried("direct", work.result, work.tokens, seconds)


async def self_consistency(expert: Expert, problem: str, tokens: int) -> Tried:
    """Ask one model as often as `tokens` allow, at least once, and take what it says most often."""
    began = time.monotonic()
    first = await _try(expert, problem)
    each = max(1, first.tokens if first is not None else tokens)
    more = min(MAX_SAMPLES, max(1, round(tokens / each))) - 1
    works = [first, *await asyncio.gather(*(_try(expert, problem) for _ in range(more)))]
    answer = majority([work.result for work in works if work is not None])
    spent = sum(work.tokens for work in works if work is not None)
    reason = "" if answer is not None else "the model gives no answer"
    return Tried("self-consistency", answer, spent, time.monotonic() - began, len(works), reason)


async def central(node: CollectiveNode, writer: Writer, problem: str, skills: Sequence[str], timeout_s: float) -> Tried:
    """One scheduler: write one chain, give out its steps one by one, and collect the results."""
    began = time.monotonic()
    deadline = began + timeout_s
    tokens = 0
    try:
        async with asyncio.timeout(timeout_s):
            plan = await writer.write(problem, skills)
        tokens = plan.tokens
        chain = Chain(
            secrets.token_hex(8), secrets.token_hex(8), checked(plan.steps), deadline, tokens, passed_on=False
        )
        ended = await node.chains.run(chain)
    except (NoChain, TimeoutError) as error:
        return Tried("central", None, tokens, time.monotonic() - began, reason=str(error) or "no chain in time")
    tokens += sum(decode(signed.body, StepDone).tokens for signed in ended.done)
    return Tried("central", ended.answer, tokens, time.monotonic() - began, reason=ended.reason)


def majority(answers: Sequence[str]) -> str | None:
    """What is said most often, as it was said first; ties go to what was said first."""
    said: dict[str, str] = {}
    for answer in answers:
        if (form := canonical(answer)) is not None:
            said.setdefault(form, answer)
    counts = Counter(form for answer in answers if (form := canonical(answer)) is not None)
    return said[counts.most_common(1)[0][0]] if counts else None


async def _try(expert: Expert, problem: str) -> Work | None:
    try:
        return await expert.act(SubTask("", problem))
    except StepFailed:
        return None
