"""An executor's part: take a step, learn what it is, do it, find who does the next one, report.

    Take ──▶ slot? ──▶ Brief to the planner ──▶ expert.act ──▶ choose and hand over the next step ──▶ signed Report
                         └── "at work" to the planner every third of the lease, until it says stop

Invariants: at most `slots` steps at once, and availability says how many are free; a step that its planner has given to
somebody else, or whose planner cannot be reached for a lease, is stopped; nothing of a step is kept after its report.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from blake3 import blake3

from shoal.agents.collective.market import Market
from shoal.agents.collective.work import Expert, StepFailed, SubTask, Work
from shoal.errors import NetworkError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import (
    MAX_RESULT_CHARS,
    Beacon,
    Brief,
    Briefing,
    Offer,
    Place,
    Report,
    Reported,
    StepDone,
    Take,
    Taken,
)
from shoal.swarm.signing import sign

log = logging.getLogger("shoal.collective")

MAX_BYTES = 512 * 1024
ANSWER_S = 10.0
"""How long a planner may take to answer a brief or a report."""

TAKE_S = 3.0
"""How long a candidate may take to say whether it takes a step; then the next best is asked."""

BEATS = 3
"""Signs of life in a lease."""


def take_key(node: str) -> str:
    """Where a node is handed steps."""
    return f"collective/{node}/take"


def brief_key(node: str) -> str:
    """Where a planner says what a step is."""
    return f"collective/{node}/brief"


def report_key(node: str) -> str:
    """Where a planner hears how steps go."""
    return f"collective/{node}/report"


def digest(result: str) -> bytes:
    """What an executor signs of a result."""
    return blake3(result.encode(errors="replace")).digest()


async def offer_to(fabric: Fabric, key: bytes, take: Take) -> bool:
    """Hand a step to one node; whether it acknowledged."""
    try:
        answer = await fabric.request(
            take_key(node_id_of(key)), encode(take), TAKE_S, to=key, max_reply_bytes=4096, absent_grace_s=0.2
        )
        return decode(answer, Taken, max_bytes=4096).accepted
    except NetworkError as error:
        log.info("%s did not take a step: %s", node_id_of(key), error)
        return False


async def hand_over(
    fabric: Fabric, market: Market, take: Take, requirement: str, without: frozenset[bytes] = frozenset()
) -> bytes:
    """Find who does a step; returns its key, empty where nobody takes it."""
    for one in await market.choose(requirement, take.lease_s, without):
        if await offer_to(fabric, one.candidate.key, take):
            return one.candidate.key
    return b""


class Executor:
    """One node's part as an executor.

    Args:
        slots: steps at once.
        price_usd: asked for a step.
        on_work: told of each finished step, for instance to keep its episode.
    """

    def __init__(
        self,
        fabric: Fabric,
        run: str,
        expert: Expert | None,
        *,
        slots: int = 1,
        price_usd: float = 0.0,
        on_work: Callable[[Place, Work], None] = lambda place, work: None,
    ) -> None:
        self._fabric = fabric
        self._run = run
        self._expert = expert
        self._slots = slots if expert is not None else 0
        self._price_usd = price_usd
        self._on_work = on_work
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self.done = 0
        """Steps finished."""
        self.stopped = 0
        """Steps given up because their planner said so or was gone."""

    def offer(self, beacon: Beacon) -> Offer:
        """What this node offers now. One that does no steps says so: nobody has to wait for it."""
        if self._expert is None:
            return Offer(beacon=beacon.id, availability=0.0)
        free = max(0, self._slots - len(self._tasks))
        return Offer(
            beacon=beacon.id,
            availability=free / self._slots,
            price_usd=self._price_usd,
            claims=dict(self._expert.claims),
        )

    async def start(self, market: Market, admits: Callable[[bytes], bool]) -> None:
        """Begin to take steps."""
        self._market = market
        key = take_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._take, max_bytes=4096, backlog=64, allow=admits)

    async def close(self) -> None:
        """Stop all work."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, request: Request) -> bytes:
        take = decode(request.body, Take, max_bytes=4096)
        if take.place in self._tasks:
            return encode(Taken(accepted=True))  # The same hand-over once more: its first answer was lost.
        if len(self._tasks) >= self._slots:
            return encode(Taken(accepted=False, reason="no slot is free"))
        task = asyncio.create_task(self._work(take))
        self._tasks[take.place] = task
        task.add_done_callback(lambda _: self._tasks.pop(take.place, None))
        return encode(Taken(accepted=True))

    async def _work(self, take: Take) -> None:
        place, planner = take.place, take.planner
        node = node_id_of(planner)
        try:
            body = encode(Brief(place=place))
            answer = await self._fabric.request(
                brief_key(node), body, ANSWER_S, to=planner, max_reply_bytes=MAX_BYTES, absent_grace_s=1.0
            )
            briefing = decode(answer, Briefing, max_bytes=MAX_BYTES)
        except NetworkError as error:
            log.info("step %d was taken and is not there: %s", place.step, error)
            self.stopped += 1
            return
        acting = asyncio.create_task(self._act(place, planner, briefing))
        beating = asyncio.create_task(self._beat(place, planner, briefing.lease_s))
        try:
            await asyncio.wait({acting, beating}, return_when=asyncio.FIRST_COMPLETED)
            self.stopped += not acting.done()
        finally:
            for task in (acting, beating):
                task.cancel()
            found = await asyncio.gather(acting, beating, return_exceptions=True)
            for problem in found:
                if isinstance(problem, NetworkError):
                    log.info("nobody waits for step %d any more: %s", place.step, problem)
                elif isinstance(problem, Exception):
                    raise problem

    async def _act(self, place: Place, planner: bytes, briefing: Briefing) -> None:
        assert self._expert is not None, "only a node with an expert has slots"
        began = time.monotonic()
        try:
            work = await self._expert.act(SubTask(briefing.requirement, briefing.task, briefing.needed))
        except StepFailed as error:
            await self._report(planner, Report(place=place, failure=str(error)[:512] or "it failed"))
            return
        result = work.result[:MAX_RESULT_CHARS]
        following = b""
        if briefing.next_requirement:
            after = Place(place.problem, place.chain, place.step + 1)
            take = Take(place=after, planner=planner, lease_s=briefing.lease_s)
            following = await hand_over(self._fabric, self._market, take, briefing.next_requirement)
        done = StepDone(
            run=self._run,
            place=place,
            requirement=briefing.requirement,
            result_hash=digest(result),
            tokens=work.tokens,
            seconds=time.monotonic() - began,
        )
        report = Report(place=place, result=result, done=sign(self._fabric.identity, done), next=following)
        if await self._report(planner, report):
            self.done += 1
            self._on_work(place, work)

    async def _beat(self, place: Place, planner: bytes, lease_s: float) -> None:
        """Say "at work" until the planner says stop, or has not answered for a lease."""
        heard = time.monotonic()
        while time.monotonic() - heard < lease_s:
            await asyncio.sleep(lease_s / BEATS)
            try:
                if not await self._report(planner, Report(place=place)):
                    return
                heard = time.monotonic()
            except NetworkError as error:
                log.info("the planner of step %d does not answer: %s", place.step, error)

    async def _report(self, planner: bytes, report: Report) -> bool:
        """Whether the step is still this node's."""
        answer = await self._fabric.request(
            report_key(node_id_of(planner)), encode(report), ANSWER_S, to=planner, max_reply_bytes=4096
        )
        return decode(answer, Reported, max_bytes=4096).goes_on
