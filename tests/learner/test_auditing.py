"""Whose turn it is in the learner: steps and checks never together, and checks no longer than their share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shoal.errors import NetworkError
from shoal.learner.auditing import Auditor, Turns
from shoal.protocol.episode import Episode, Task
from shoal.protocol.trust import AuditReply, AuditRequest, Claim, Finding

DEADLINE_S = 30.0


def claim(number: int) -> Claim:
    episode = Episode(
        id=f"e{number}",
        group="g",
        index=0,
        task=Task(env="digit", id="train-0", seed=0),
        turns=(),
        outcome="void",
        void_reason="a test's",
    )
    return Claim(episode=episode, seed=0, max_tokens=1, stop=(), opening=())


async def test_checks_wait_for_the_learner_to_idle() -> None:
    turns, order = Turns(0.0), []

    async def check() -> None:
        async with turns.checking():
            order.append("check")

    async with asyncio.timeout(DEADLINE_S):
        checking = asyncio.create_task(check())
        async with turns.stepping():
            await asyncio.sleep(0.02)
            order.append("step")
        await asyncio.sleep(0.02)
        assert order == ["step"], "no share of the steps' time is theirs"
        async with turns.waiting():
            await checking
    assert order == ["step", "check"]


async def test_steps_and_passes_take_turns_and_no_pass_begins_beyond_the_share() -> None:
    turns, together, running = Turns(0.2), 0, 0
    passes = 0

    async def check() -> None:
        nonlocal passes, running, together
        while True:
            async with turns.checking():
                assert turns.waited_s < 0.2 * turns.stepped_s, "no pass begins beyond the share"
                running += 1
                together = max(together, running)
                await asyncio.sleep(0.01)
                running -= 1
                passes += 1

    async with asyncio.timeout(DEADLINE_S):
        checking = asyncio.create_task(check())
        for _ in range(40):
            async with turns.stepping():
                running += 1
                together = max(together, running)
                await asyncio.sleep(0.01)
                running -= 1
        assert not checking.done(), "its own assertion held"
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
    assert together == 1 and passes > 0


class Checker:
    """Finds nothing, and says what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def check(self, claims: Sequence[Claim]) -> list[Finding]:
        self.seen += [one.episode.id for one in claims]
        return [Finding(episode=one.episode.id) for one in claims]


async def test_findings_are_told_and_lost_ones_computed_again() -> None:
    waiting = [claim(n) for n in range(3)]
    told: list[str] = []
    made: list[Checker] = []
    asked = 0

    async def ask(request: AuditRequest) -> AuditReply:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise NetworkError("the answer was lost.")
        told.extend(finding.episode for finding in request.findings)
        left = tuple(one for one in waiting if one.episode.id not in told)
        return AuditReply(claims=left, ended=not left)

    def make() -> Checker:
        made.append(Checker())
        return made[-1]

    turns = Turns(0.1)
    auditor = Auditor(ask, make, turns)  # type: ignore[arg-type]
    async with asyncio.timeout(DEADLINE_S), turns.waiting():
        await auditor.run()
    assert told == ["e0", "e1", "e2"] and len(made) == 1
    assert made[0].seen == ["e0", "e1", "e2"] * 2, "what the coordinator did not get is computed again"
    assert auditor.num_checked == 6
