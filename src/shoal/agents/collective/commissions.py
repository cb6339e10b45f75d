"""A planner's first part: take commissions, have chains written, and tell the poser how each ended.

Invariants: at most `MAX_COMMISSIONS` at once; a chain that was written is checked before anybody hears of it; every
commission ends by its deadline, and its poser is told, again and again until then where it does not answer; a verdict
is taken from the poser that commissioned the chain, once, and passed on to those who did its steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from shoal.agents.collective.chain import Chain
from shoal.agents.collective.chains import MAX_REMEMBERED, Chains
from shoal.agents.collective.executor import MAX_BYTES
from shoal.agents.collective.patience import Asking
from shoal.agents.collective.posing import ASK_S, commission_key, judged_key, result_key, underway_key
from shoal.agents.collective.work import NoChain, Plan, PlannedStep, Writer
from shoal.errors import NetworkError
from shoal.fabric.errors import RemoteError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import (
    MAX_REQUIREMENT_CHARS,
    MAX_STEPS,
    MAX_TASK_CHARS,
    ChainResult,
    Commission,
    Judged,
    Progress,
    Underway,
)

log = logging.getLogger("shoal.collective")

MAX_COMMISSIONS = 64

TELL_AGAIN_S = 1.0
"""Before a poser that did not answer is told of a chain's end again."""

OnPlan = Callable[[str, Plan, float | None], None]
"""Told of each chain that ran and what its answer turned out to be worth; None where nobody said."""


class Commissions:
    """One node's part.

    Args:
        writer: None: this node writes no chains.
        skills: what the ledger has attestations of.
        on_plan: told of each chain that was written here, for instance to keep its episode.
    """

    def __init__(
        self,
        asking: Asking,
        chains: Chains,
        writer: Writer | None,
        skills: Callable[[], Sequence[str]],
        on_plan: OnPlan | None = None,
    ) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._chains = chains
        self._writer = writer
        self._skills = skills
        self._on_plan = on_plan
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._awaiting: OrderedDict[str, tuple[bytes, Plan]] = OrderedDict()
        """Chains that ended, with their posers."""

    async def start(self, admits: Callable[[bytes], bool]) -> None:
        """Begin to take commissions."""
        node = self._fabric.identity.node_id
        await self._fabric.serve(commission_key(node), self._take, max_bytes=MAX_BYTES, allow=admits)
        await self._fabric.serve(underway_key(node), self._underway, max_bytes=4096, allow=admits)
        await self._fabric.serve(judged_key(node), self._judged, max_bytes=4096, backlog=256, allow=admits)

    async def close(self) -> None:
        """Stop all of them; plans that still wait for a verdict are given on without one."""
        tasks = list(self._at_work.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._awaiting:
            self._give_on_oldest()

    def _give_on_oldest(self) -> None:
        chain, (_, plan) = self._awaiting.popitem(last=False)
        if self._on_plan is not None:
            self._on_plan(chain, plan, None)

    async def _take(self, request: Request) -> bytes:
        wanted = decode(request.body, Commission, max_bytes=MAX_BYTES)
        if self._writer is None or len(self._at_work) >= MAX_COMMISSIONS:
            raise NoChain("this node writes no chains now.")
        if wanted.chain not in self._at_work:
            task = asyncio.create_task(self._plan(self._writer, wanted, request.sender_key))
            self._at_work[wanted.chain] = task
            task.add_done_callback(lambda _: self._at_work.pop(wanted.chain, None))
        return b""

    async def _plan(self, writer: Writer, wanted: Commission, poser: bytes) -> None:
        deadline = time.monotonic() + wanted.deadline_s
        try:
            async with asyncio.timeout(wanted.deadline_s):
                plan = await writer.write(wanted.text, self._skills())
            chain = Chain(wanted.problem, wanted.chain, checked(plan.steps), deadline, plan.tokens)
            result = await self._chains.run(chain)
            self._awaiting[wanted.chain] = (poser, plan)
            if len(self._awaiting) > MAX_REMEMBERED:
                self._give_on_oldest()
        except (NoChain, TimeoutError) as error:
            why = str(error)[:500] or "no chain was written in time"
            result = ChainResult(problem=wanted.problem, chain=wanted.chain, answer=None, reason=why)
        await self._tell(poser, result, deadline)

    async def _tell(self, poser: bytes, result: ChainResult, deadline: float) -> None:
        """How a chain ended, until its poser has heard it or waits no more."""
        key, body = result_key(node_id_of(poser)), encode(result)
        while True:
            try:
                await self._asking.request(key, body, ASK_S, to=poser, max_reply_bytes=16)
                return
            except NetworkError as error:
                log.info("the poser of chain %s does not hear how it ended: %s", result.chain, error)
                refused = isinstance(error, RemoteError) and error.kind != "busy"
                if refused or time.monotonic() >= deadline:
                    return
            await asyncio.sleep(TELL_AGAIN_S)

    async def _underway(self, request: Request) -> bytes:
        chain = decode(request.body, Underway, max_bytes=4096).chain
        return encode(Progress(here=chain in self._at_work, steps=self._chains.view(chain)))

    async def _judged(self, request: Request) -> bytes:
        judged = decode(request.body, Judged, max_bytes=4096)
        poser, plan = self._awaiting.get(judged.chain, (b"", None))
        if plan is not None and poser == request.sender_key:
            del self._awaiting[judged.chain]
            await self._chains.judge(judged.chain, judged.score)
            if self._on_plan is not None:
                self._on_plan(judged.chain, plan, judged.score)
        return b""


def checked(steps: Sequence[PlannedStep]) -> list[PlannedStep]:
    """A chain, if it can be executed.

    Raises:
        NoChain: it is empty, too long, or has a step that nobody could be told, or that needs one that does not come
            before it.
    """
    if not 1 <= len(steps) <= MAX_STEPS:
        raise NoChain(f"a chain has {len(steps)} steps; 1 to {MAX_STEPS} are possible.")
    for number, step in enumerate(steps):
        if not step.requirement.strip() or not step.task.strip():
            raise NoChain(f"step {number + 1} says nothing.")
        if len(step.requirement) > MAX_REQUIREMENT_CHARS or len(step.task) > MAX_TASK_CHARS:
            raise NoChain(f"step {number + 1} is too long.")
        if any(not 0 <= one < number for one in step.needs):
            raise NoChain(f"step {number + 1} needs a step that does not come before it.")
    return list(steps)
