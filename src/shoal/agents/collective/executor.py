"""An executor's part: take a step, learn what it is, do it, find who does the next one, report.

    Take ──▶ slot? ──▶ Brief to the planner ──▶ expert.act ───────────────▶ hand over the next step ──▶ signed Report
                         │                       └── meanwhile: who could do the next one? ──┘               │
                         └── "at work" to the planner every third of the lease, until it says stop        Verdict

The beacon for the next step goes out soon after this one begins (once other chains' hand-overs of the same moment are
over), so that nobody waits for offers when it is done; those of a step that took longer than `FRESH_S` are asked for
again.

Invariants: at most `slots` steps at once, and availability says how many are free; a step that its planner has given to
somebody else, or whose planner cannot be reached for a lease, is stopped; a result is reported until its planner has
answered, or is given up; nothing of a step is kept after its report but what `on_work` is to have, which waits for its
planner's verdict: of at most `MAX_AWAITING` steps.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from blake3 import blake3

from shoal.agents.collective.market import Market
from shoal.agents.collective.patience import Asking
from shoal.agents.collective.work import Expert, StepFailed, SubTask, Work
from shoal.errors import NetworkError, RecordError, ShoalError
from shoal.fabric.errors import RemoteError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.planning.selection import Chosen
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
    Verdict,
)
from shoal.swarm.signing import sign

log = logging.getLogger("shoal.collective")

MAX_BYTES = 512 * 1024
ANSWER_S = 10.0
"""How long a planner may take to answer a brief or a report, at least (`patience`)."""

AGAIN_S = 0.5
"""Before a report that was not answered is made again."""

TAKE_S = 3.0
"""How long a candidate may take to say whether it takes a step, at least; then the next best is asked."""

BEATS = 3
"""Signs of life in a lease."""

AHEAD_S = 0.25
"""After so long in a step, the next one's beacon goes out."""

FRESH_S = 5.0
"""Into a step, such offers are good; who has no time any more says so when it is asked."""

MAX_AWAITING = 256
"""Finished steps whose verdict is waited for; of more, the oldest is given on without one."""

OnWork = Callable[[Place, Work, float | None], None]
"""Told of each finished step and what the chain's answer turned out to be worth; None where nobody said."""


def take_key(node: str) -> str:
    """Where a node is handed steps."""
    return f"collective/{node}/take"


def brief_key(node: str) -> str:
    """Where a planner says what a step is."""
    return f"collective/{node}/brief"


def report_key(node: str) -> str:
    """Where a planner hears how steps go."""
    return f"collective/{node}/report"


def verdict_key(node: str) -> str:
    """Where an executor hears what came of its steps."""
    return f"collective/{node}/verdict"


def digest(result: str) -> bytes:
    """What an executor signs of a result."""
    return blake3(result.encode(errors="replace")).digest()


async def offer_to(asking: Asking, key: bytes, take: Take) -> bool:
    """Hand a step to one node; whether it acknowledged."""
    try:
        answer = await asking.request(
            take_key(node_id_of(key)), encode(take), TAKE_S, to=key, max_reply_bytes=4096, absent_grace_s=0.2
        )
        return decode(answer, Taken, max_bytes=4096).accepted
    except (NetworkError, RecordError) as error:  # no answer, or nonsense: there are others
        log.info("%s did not take a step: %s", node_id_of(key), error)
        return False


async def hand_over(asking: Asking, candidates: Iterable[Chosen], take: Take) -> bytes:
    """Give a step to the first candidate that takes it; returns its key, empty where nobody does."""
    for one in candidates:
        if await offer_to(asking, one.candidate.key, take):
            return one.candidate.key
    return b""


class Executor:
    """One node's part as an executor.

    Args:
        slots: steps at once.
        price_usd: asked for a step.
        on_work: told of each finished step, for instance to keep its episode; None: nothing is kept of any.
    """

    def __init__(
        self,
        asking: Asking,
        run: str,
        expert: Expert | None,
        *,
        slots: int = 1,
        price_usd: float = 0.0,
        on_work: OnWork | None = None,
    ) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._run = run
        self._expert = expert
        self._slots = slots if expert is not None else 0
        self._price_usd = price_usd
        self._on_work = on_work
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self._awaiting: OrderedDict[Place, tuple[bytes, Work]] = OrderedDict()
        """Finished steps with their planners."""
        self._draining = False
        self.done = 0
        """Steps finished."""
        self.stopped = 0
        """Steps given up because their planner said so or was gone."""

    def offer(self, beacon: Beacon) -> Offer:
        """What this node offers now. One that does no steps says so: nobody has to wait for it."""
        if self._expert is None:
            return Offer(beacon=beacon.id, availability=0.0)
        free = 0 if self._draining else max(0, self._slots - len(self._tasks))
        return Offer(
            beacon=beacon.id,
            availability=free / self._slots,
            price_usd=self._price_usd,
            claims=dict(self._expert.claims),
        )

    @property
    def num_at_work(self) -> int:
        """Steps that are being done."""
        return len(self._tasks)

    def drain(self) -> None:
        """Take no further steps."""
        self._draining = True

    async def idle(self) -> None:
        """Wait until no step is at work."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def start(self, market: Market, admits: Callable[[bytes], bool]) -> None:
        """Begin to take steps."""
        self._market = market
        key = take_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._take, max_bytes=4096, backlog=64, allow=admits)
        heard = verdict_key(self._fabric.identity.node_id)
        await self._fabric.serve(heard, self._judged, max_bytes=4096, backlog=256, allow=admits)

    async def close(self) -> None:
        """Stop all work; what still waits for a verdict is given on without one."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._awaiting:
            self._give_on_oldest()

    async def _judged(self, request: Request) -> bytes:
        verdict = decode(request.body, Verdict, max_bytes=4096)
        waiting = self._awaiting.get(verdict.place)
        if waiting is not None and waiting[0] == request.sender_key and self._on_work is not None:
            del self._awaiting[verdict.place]
            self._on_work(verdict.place, waiting[1], verdict.score)
        return b""

    def _give_on_oldest(self) -> None:
        place, (_, work) = self._awaiting.popitem(last=False)
        assert self._on_work is not None, "only then anything waits"
        self._on_work(place, work, None)

    async def _take(self, request: Request) -> bytes:
        take = decode(request.body, Take, max_bytes=4096)
        if take.place in self._tasks:
            return encode(Taken(accepted=True))  # The same hand-over once more: its first answer was lost.
        if self._draining or len(self._tasks) >= self._slots:
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
            # Not by `_asking`: it is answered when its planner has heard who took the step, and not at once.
            limit_s = self._asking.patience.limit_s(ANSWER_S, planner)
            answer = await self._fabric.request(
                brief_key(node), body, limit_s, to=planner, max_reply_bytes=MAX_BYTES, absent_grace_s=1.0
            )
            briefing = decode(answer, Briefing, max_bytes=MAX_BYTES)
        except (NetworkError, RecordError) as error:
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
        requirement = briefing.next_requirement
        choosing = asyncio.create_task(self._choose_ahead(requirement, briefing.lease_s)) if requirement else None
        try:
            work = await self._done_by(self._expert, SubTask(briefing.requirement, briefing.task, briefing.needed))
            result, seconds = work.result[:MAX_RESULT_CHARS], time.monotonic() - began
            following = b""
            if choosing is not None:
                candidates = await choosing if AHEAD_S < seconds < FRESH_S else ()
                after = Place(place.problem, place.chain, place.step + 1)
                take = Take(place=after, planner=planner, lease_s=briefing.lease_s)
                following = await hand_over(self._asking, candidates, take)
                if not following:
                    again = await self._market.choose(requirement, briefing.lease_s)
                    following = await hand_over(self._asking, again, take)
        except StepFailed as error:
            await self._deliver(planner, Report(place=place, failure=str(error)[:512] or "it failed"))
            return
        finally:
            if choosing is not None:
                choosing.cancel()
                await asyncio.gather(choosing, return_exceptions=True)
        done = StepDone(
            run=self._run,
            place=place,
            requirement=briefing.requirement,
            result_hash=digest(result),
            tokens=work.tokens,
            seconds=seconds,
        )
        report = Report(place=place, result=result, done=sign(self._fabric.identity, done), next=following)
        if self._on_work is not None:
            self._awaiting[place] = (planner, work)  # Before the report: the verdict may come with its answer.
            if len(self._awaiting) > MAX_AWAITING:
                self._give_on_oldest()
        if await self._deliver(planner, report):
            self.done += 1
        else:
            self._awaiting.pop(place, None)  # Somebody else's result stands in its place.

    async def _done_by(self, expert: Expert, task: SubTask) -> Work:
        """What the expert makes of a step; whatever else keeps it from that is a failure too, of which its planner is
        to hear before the lease runs out."""
        try:
            return await expert.act(task)
        except StepFailed:
            raise
        except ShoalError as error:
            raise StepFailed(f"it cannot be done here: {error.problem}") from error

    async def _choose_ahead(self, requirement: str, lease_s: float) -> list[Chosen]:
        await asyncio.sleep(AHEAD_S)
        return await self._market.choose(requirement, lease_s)

    async def _beat(self, place: Place, planner: bytes, lease_s: float) -> None:
        """Say "at work" until the planner says stop, or has not answered for a lease, or longer where answers are slow.

        A sign of life that is lost is made again soon enough for the next one to keep the lease.
        """
        heard = time.monotonic()
        while time.monotonic() - heard < self._asking.patience.limit_s(lease_s, planner):
            # Not all at one time, where many steps began together.
            await asyncio.sleep(lease_s / BEATS * random.uniform(0.6, 1.0))
            try:
                if not await self._report(planner, Report(place=place), lease_s / BEATS):
                    return
                heard = time.monotonic()
            except NetworkError as error:
                log.info("the planner of step %d does not answer: %s", place.step, error)

    async def _deliver(self, planner: bytes, report: Report) -> bool:
        """Report what ends a step until it is answered (`_beat` knows when that is in vain); whether it is taken."""
        while True:
            try:
                return await self._report(planner, report, ANSWER_S)
            except RemoteError as error:
                if error.kind != "busy":
                    raise
            except NetworkError as error:
                log.info("the planner of step %d has not heard what came of it yet: %s", report.place.step, error)
            await asyncio.sleep(AGAIN_S)

    async def _report(self, planner: bytes, report: Report, floor_s: float) -> bool:
        """Whether the step is still this node's."""
        answer = await self._asking.request(
            report_key(node_id_of(planner)), encode(report), floor_s, to=planner, max_reply_bytes=4096
        )
        return decode(answer, Reported, max_bytes=4096).goes_on
