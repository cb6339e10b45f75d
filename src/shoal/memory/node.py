"""One node's memory in a run's swarm: it shares, has its candidates tried, runs trials for others, checks what comes.

    sharing     signed events from and to everybody                     `sharing`
    desk        this node's own candidates, their trials leased         `leasing`
    replayer    trials of this node's and of others' candidates         `replayer`
    checking    others' admissions replayed before they are used        `verifying`

Invariants: a node tries only candidates that it wrote down itself, so nothing is tried everywhere at once; a claim that
is left open, or a candidate that cannot be tried, is looked at again after `AGAIN_S`, not at once; nothing of this node
outlives its context.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from shoal.errors import ShoalError
from shoal.memory.keeper import Keeper
from shoal.memory.leasing import TrialDesk
from shoal.memory.replayer import Replayer
from shoal.memory.sharing import Sharing
from shoal.memory.state import Memory
from shoal.memory.trials import Arena
from shoal.memory.verifying import verify
from shoal.swarm.member import Member

log = logging.getLogger("shoal.memory")

MAX_OPEN = 8
"""Candidates under test at once."""

AGAIN_S = 600.0


class MemoryNode:
    """`async with MemoryNode(member, keeper, arenas): …`

    Args:
        keeper: opened with this node's identity and `vouched_only`.
        arenas: what trials this node can run, by family; empty: it only shares.
        every_s: between two looks at what is new.
    """

    def __init__(
        self,
        member: Member,
        keeper: Keeper,
        arenas: Mapping[str, Arena],
        *,
        share_every_s: float = 5.0,
        lease_s: float = 60.0,
        every_s: float = 2.0,
    ) -> None:
        fabric = member.fabric
        self._member, self._keeper, self._arenas, self._every_s = member, keeper, dict(arenas), every_s
        self.sharing = Sharing(fabric, keeper, self._peers, member.is_granted, every_s=share_every_s)
        self.desk = TrialDesk(fabric, keeper, member.is_granted, lease_s=lease_s)
        self.replayer = Replayer(fabric, arenas, self._desks) if arenas else None
        self._admitting: dict[str, asyncio.Task[None]] = {}
        self._left_open: dict[str, float] = {}
        self._stack = AsyncExitStack()
        self.checked: dict[str, str] = {}
        """Others' admissions that were looked at, and what came of it."""

    def _peers(self) -> list[bytes]:
        own = self._member.fabric.identity.public_key
        return [node.record.public_key for node in self._member.nodes("agent") if node.record.public_key != own]

    def _desks(self) -> list[bytes]:
        return [self._member.fabric.identity.public_key, *self._peers()]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self.sharing.start()
            stack.push_async_callback(self.desk.close)
            await self.desk.start()
            loops = [self.sharing.run(), self._try_own(), self._check_others()]
            if self.replayer is not None:
                loops.append(self.replayer.run())
            tasks = [asyncio.create_task(loop) for loop in loops]
            stack.push_async_callback(self._end, tasks)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        everything = [*tasks, *self._admitting.values()]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a part of this node's memory stopped: %r", error)

    async def _try_own(self) -> None:
        while True:
            for memory in list(self._keeper.store.memories("candidate")):
                arena = self._arenas.get(memory.entry.family)
                if len(self._admitting) >= MAX_OPEN:
                    break
                waits = memory.id in self._admitting or self._left_open.get(memory.id, 0.0) > time.monotonic()
                if arena is not None and not waits and self._is_own(memory):
                    task = asyncio.create_task(self._admit(memory.id, arena))
                    self._admitting[memory.id] = task
            await asyncio.sleep(self._every_s)

    async def _admit(self, entry: str, arena: Arena) -> None:
        try:
            decision = await self.desk.admit(entry, arena)
            log.info("%s: %s after %d trials", entry, decision.verdict, decision.num_trials)
        except ShoalError as error:
            log.warning("%s could not be tried: %s", entry, error)
            self._left_open[entry] = time.monotonic() + AGAIN_S
        finally:
            self._admitting.pop(entry, None)

    def _is_own(self, memory: Memory) -> bool:
        return self._keeper.store.history(memory)[0].node == self._keeper.store.node

    async def _check_others(self) -> None:
        own = self._keeper.store.node
        while True:
            for memory in list(self._keeper.store.memories("active")):
                arena = self._arenas.get(memory.entry.family)
                waits = self._left_open.get(memory.admission, 0.0) > time.monotonic()
                if arena is None or own in memory.vouched or waits:
                    continue
                try:
                    found = await verify(self._keeper, arena, memory)
                except ShoalError as error:
                    log.warning("%s could not be checked: %s", memory.id, error)
                    self._left_open[memory.admission] = time.monotonic() + AGAIN_S
                    continue
                self.checked[memory.admission] = f"{found.verdict}: {found.reason}"
                log.info("%s: %s (%s)", memory.id, found.verdict, found.reason)
                if found.verdict == "open":
                    self._left_open[memory.admission] = time.monotonic() + AGAIN_S
            await asyncio.sleep(self._every_s)
