"""A planner's part: write a chain, give its first step away, watch over its leases, tell the poser how it ended.

    write ──▶ give(0) ──▶ executor 0 ──▶ executor 1 ──▶ … ──▶ last result = the chain's answer
                │  ▲           each hands the next step over itself, and reports whom it went to
                ▼  └── a lease that ran out, a failure, or a step that nobody took: given again, to somebody else

Invariants: a step has one holder at a time, and only its holder is briefed and believed; a step's result is taken once,
and whoever brings it again is told that it was; what is asked of one executor is never told to another; a chain ends by
its deadline, with an answer or a reason; every hand-over that its executor acknowledged ends in one contribution of the
ledger: delivered, failed or late. Who did a chain's steps is remembered for its verdict, of at most `MAX_REMEMBERED`
chains. A lease is longer where answers are slow, and time in which this process itself stood still is not held against
an executor, once between two signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from shoal.agents.collective.chain import Chain, Step
from shoal.agents.collective.executor import (
    BEATS,
    MAX_BYTES,
    brief_key,
    digest,
    hand_over,
    offer_to,
    report_key,
    verdict_key,
)
from shoal.agents.collective.market import Market
from shoal.agents.collective.patience import Asking
from shoal.errors import NetworkError, RecordError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import (
    Brief,
    ChainResult,
    Place,
    Report,
    Reported,
    StepDone,
    StepView,
    Take,
    Verdict,
)
from shoal.protocol.ledger import Contribution, Delivery
from shoal.swarm.signing import verified

log = logging.getLogger("shoal.collective")

LEASE_S = 6.0
"""Without a sign of life for so long, and what answers take here, a step is given to somebody else."""

STOOD_STILL_S = 0.5
"""Whoever wakes so much too late has not been running: signs of life may lie unread."""

RETRY_S = 0.5
"""Before a step that nobody took is offered again."""

TRIES = 10
"""To hand a step to one node and no other."""

MAX_CHAINS = 256
MAX_REMEMBERED = 256

TELL_S = 3.0
"""An executor that does not hear its verdict within this goes without."""


class Chains:
    """All chains that this node watches over.

    Args:
        credit: told of every hand-over's end, for the ledger: (executor, contribution).
    """

    def __init__(
        self,
        asking: Asking,
        run: str,
        market: Market,
        credit: Callable[[bytes, Contribution], None],
        *,
        lease_s: float = LEASE_S,
    ) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._run = run
        self._market = market
        self._credit = credit
        self._lease_s = lease_s
        self._chains: dict[str, Chain] = {}
        self._done_by: OrderedDict[str, list[tuple[Place, bytes]]] = OrderedDict()
        """Ended chain -> its steps and who did them."""

    @property
    def _patient_s(self) -> float:
        """A lease as this planner counts it: what is under way for longer than a lease is not lost."""
        return self._lease_s + self._asking.patience.limit_s(0.0)

    async def start(self, admits: Callable[[bytes], bool]) -> None:
        """Begin to brief and to hear reports."""
        node = self._fabric.identity.node_id
        await self._fabric.serve(
            brief_key(node), self._brief, max_bytes=4096, concurrency=64, backlog=256, allow=admits
        )
        await self._fabric.serve(report_key(node), self._report, max_bytes=MAX_BYTES, backlog=256, allow=admits)

    def view(self, chain: str) -> tuple[StepView, ...]:
        """How far a chain is; empty for one that does not run here."""
        found = self._chains.get(chain)
        return found.view() if found is not None else ()

    async def judge(self, chain: str, score: float) -> None:
        """Tell those who did an ended chain's steps what its answer turned out to be worth."""
        done = self._done_by.pop(chain, [])
        await asyncio.gather(*(self._tell(executor, Verdict(place=place, score=score)) for place, executor in done))

    async def _tell(self, executor: bytes, verdict: Verdict) -> None:
        key = verdict_key(node_id_of(executor))
        try:
            await self._asking.request(
                key, encode(verdict), TELL_S, to=executor, max_reply_bytes=16, absent_grace_s=0.2
            )
        except NetworkError as error:
            log.debug("a verdict was not heard: %s", error)  # Who keeps no episodes listens for none.

    async def run(self, chain: Chain, first: bytes = b"") -> ChainResult:
        """See a chain through.

        Args:
            first: who gets the first step, without asking anybody else; empty: whoever is best.
        """
        if len(self._chains) >= MAX_CHAINS:
            chain.reason = "this planner watches over too many chains"
            return chain.result()
        self._chains[chain.id] = chain
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + chain.deadline - time.monotonic()):
                    if first and not await self._give_to(chain, first):
                        chain.reason = "it did not take the step"
                        return chain.result()
                    await self._watch(chain, reassign=not first)
        finally:
            del self._chains[chain.id]
            done = [(chain.place(n), step.holder) for n, step in enumerate(chain.steps) if step.done is not None]
            self._done_by[chain.id] = done
            while len(self._done_by) > MAX_REMEMBERED:
                self._done_by.popitem(last=False)
            held = chain.steps[chain.at] if chain.at < len(chain.steps) else None
            if held is not None and held.holder:
                self._ended(chain, chain.at, "late")
            async with chain.changed:
                chain.changed.notify_all()
        return chain.result()

    async def _watch(self, chain: Chain, *, reassign: bool) -> None:
        while chain.at < len(chain.steps):
            number = chain.at
            step = chain.steps[number]
            if not step.holder:
                if not reassign and step.failed:
                    return
                await self._give(chain, number)
                continue
            if not await self._is_kept(chain, step):
                self._ended(chain, number, "late")
                if not reassign:
                    chain.reason = "its executor fell silent"
                    return

    async def _is_kept(self, chain: Chain, step: Step) -> bool:
        """Wait while a step is at work; False: its lease has run out."""
        async with chain.changed:
            while step.result is None and step.holder:
                if (left_s := step.until - time.monotonic()) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left_s):
                            await chain.changed.wait()
                elif left_s < -STOOD_STILL_S and not step.was_excused:
                    step.was_excused = True
                    step.until = time.monotonic() + self._lease_s / BEATS
                else:
                    return False
        return True

    async def _give(self, chain: Chain, number: int) -> None:
        """Offer a step until somebody has it; those who failed with it only when nobody else is left."""
        step = chain.steps[number]
        take = Take(place=chain.place(number), planner=self._fabric.identity.public_key, lease_s=self._lease_s)
        requirement = step.planned.requirement
        candidates = await self._market.choose(requirement, self._lease_s)
        # Those who failed with it once are asked when nobody else takes it.
        candidates.sort(key=lambda one: one.candidate.key in step.failed)
        key = await hand_over(self._asking, candidates, take)
        if key:
            await self._hold(chain, number, key)
        else:
            chain.reason = f"nobody takes step {number + 1}: {requirement[:100]}"
            await asyncio.sleep(RETRY_S)

    async def _give_to(self, chain: Chain, key: bytes) -> bool:
        """Hand the first step to one node, which may be busy at first."""
        take = Take(place=chain.place(0), planner=self._fabric.identity.public_key, lease_s=self._lease_s)
        for _ in range(TRIES):
            if await offer_to(self._asking, key, take):
                await self._hold(chain, 0, key)
                return True
            await asyncio.sleep(RETRY_S)
        return False

    async def _hold(self, chain: Chain, number: int, key: bytes) -> None:
        step = chain.steps[number]
        async with chain.changed:
            step.holder, step.acknowledged, step.was_excused = key, True, False
            step.until = time.monotonic() + self._patient_s
            chain.changed.notify_all()

    def _ended(self, chain: Chain, number: int, delivery: Delivery, done: StepDone | None = None) -> None:
        """A hand-over is over: into the ledger with it; the step is free unless it was delivered."""
        step = chain.steps[number]
        if step.acknowledged:
            tokens, seconds = (done.tokens, done.seconds) if done is not None else (0, 0.0)
            what = Contribution(
                problem=chain.problem, chain=chain.id, step=number, delivery=delivery, tokens=tokens, seconds=seconds
            )
            self._credit(step.holder, what)
        if delivery != "delivered":
            step.failed.add(step.holder)
            step.holder = b""

    # What executors ask and say

    def _held(self, place: Place, sender: bytes) -> Chain | None:
        """The chain, if this sender holds this step of it now."""
        chain = self._chains.get(place.chain)
        if chain is None or chain.problem != place.problem or place.step != chain.at:
            return None
        return chain if chain.steps[place.step].holder == sender else None

    def _is_settled(self, place: Place) -> bool:
        """Whether it is clear who holds this step."""
        chain = self._chains.get(place.chain)
        if chain is None or place.step != chain.at:
            return chain is None or place.step < chain.at
        return bool(chain.steps[place.step].holder)

    def _was_delivered(self, place: Place, sender: bytes) -> bool:
        """Whether this sender's result of this step was taken."""
        chain = self._chains.get(place.chain)
        if chain is None:
            return (place, sender) in self._done_by.get(place.chain, ())
        step = chain.steps[place.step] if place.step < len(chain.steps) else None
        return step is not None and step.done is not None and step.holder == sender

    async def _brief(self, request: Request) -> bytes:
        place = decode(request.body, Brief, max_bytes=4096).place
        chain = self._chains.get(place.chain)
        if chain is not None:
            with contextlib.suppress(TimeoutError):
                # It may be asked for before the report that says who took the step has come.
                async with asyncio.timeout(self._patient_s), chain.changed:
                    await chain.changed.wait_for(lambda: self._is_settled(place))
        found = self._held(place, request.sender_key)
        if found is None:
            raise RecordError("that step is not yours.")
        found.steps[place.step].acknowledged = True
        return encode(found.briefing(place.step, self._lease_s))

    async def _report(self, request: Request) -> bytes:
        report = decode(request.body, Report, max_bytes=MAX_BYTES)
        chain = self._chains.get(report.place.chain)
        if chain is None:
            return encode(Reported(goes_on=self._was_delivered(report.place, request.sender_key)))
        number = report.place.step
        async with chain.changed:
            if self._held(report.place, request.sender_key) is None:
                return encode(Reported(goes_on=self._was_delivered(report.place, request.sender_key)))
            step = chain.steps[number]
            if report.failure:
                chain.reason = f"step {number + 1} failed: {report.failure}"
                self._ended(chain, number, "failed")
            elif report.done is None:
                step.until, step.was_excused = time.monotonic() + self._patient_s, False
            else:
                done = self._checked(report, request.sender_key, step)
                step.result, step.done = report.result, report.done
                self._ended(chain, number, "delivered", done)
                if report.next and number + 1 < len(chain.steps):
                    following = chain.steps[number + 1]
                    following.holder, following.acknowledged = report.next, False
                    following.until = time.monotonic() + self._patient_s
            chain.changed.notify_all()
        return encode(Reported(goes_on=True))

    def _checked(self, report: Report, sender: bytes, step: Step) -> StepDone:
        """The signed part of a report, if it is what the report says; raises `RecordError` otherwise."""
        assert report.done is not None
        done = verified(report.done, StepDone)
        fits = done.run == self._run and done.place == report.place and done.requirement == step.planned.requirement
        if report.done.signer != sender or not fits or done.result_hash != digest(report.result):
            raise RecordError("a report's signature is not about this step and result.")
        return done
