"""The learner's part in checking workers: it asks for claims, computes them between its steps, and tells what it found.

    run/audit ──▶ claims ──▶ a pass (`claims`), when a step allows it ──▶ findings ──▶ run/audit …

Invariants: a pass and a step never run at once, so neither slows the other down unseen; while the learner waits for a
batch, passes run freely and a batch that comes waits for the one under way; otherwise a pass begins only while all that
steps have waited for passes is below `share` of their own time; findings that the coordinator did not take are computed
again, not remembered; the second body exists only from the first claim on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from shoal.errors import NetworkError
from shoal.fabric.errors import RemoteError
from shoal.fabric.waits import ENDLESS_S, waiting
from shoal.learner.claims import ClaimChecker
from shoal.protocol.trust import AuditReply, AuditRequest, Claim, Finding

log = logging.getLogger("shoal.learner")

PASS_EPISODES = 32
"""Of one pass: a step waits for no more than one."""

RETRY_S = 1.0


class Turns:
    """Whose turn it is: the optimizer step's, or a check's.

    Args:
        share: of the steps' time, the most that they may wait for checks in all.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._idle = False
        self.stepped_s = 0.0
        self.waited_s = 0.0
        """What steps have waited for checks."""

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """The learner has nothing to do meanwhile."""
        self._set_idle(True)
        try:
            yield
        finally:
            self._set_idle(False)

    @asynccontextmanager
    async def stepping(self) -> AsyncIterator[None]:
        """The learner takes a step; waits for the pass under way, if there is one."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        async with self._lock:
            began_at = loop.time()
            self.waited_s += began_at - asked_at
            try:
                yield
            finally:
                self.stepped_s += loop.time() - began_at
        self._tell()

    @asynccontextmanager
    async def checking(self) -> AsyncIterator[None]:
        """A pass may run; waits until it may."""
        while True:
            while not (self._idle or self.waited_s < self._share * self.stepped_s):
                await self._changed.wait()
            async with self._lock:
                if self._idle or self.waited_s < self._share * self.stepped_s:
                    yield
                    return

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Auditor:
    """Answers the coordinator's claims until the run is over.

    Args:
        ask: tells findings and gives the next claims.
        make: builds the checker, which takes memory and a moment.
    """

    def __init__(
        self,
        ask: Callable[[AuditRequest], Awaitable[AuditReply]],
        make: Callable[[], ClaimChecker],
        turns: Turns,
    ) -> None:
        self._ask = ask
        self._make = make
        self._turns = turns
        self._checker: ClaimChecker | None = None
        self.num_checked = 0

    async def run(self) -> None:
        """Ask, check, tell; again until the coordinator says that the run is over.

        Raises:
            NetworkError: the coordinator refuses to be asked.
        """
        findings: tuple[Finding, ...] = ()
        while True:
            try:
                with waiting("episodes to check", whom="coordinator", until="there are some", usual_s=ENDLESS_S):
                    reply = await self._ask(AuditRequest(findings=findings))
            except NetworkError as error:
                if isinstance(error, RemoteError) and error.kind == "refused":
                    raise
                findings = ()  # What it did not get it will ask for again.
                await asyncio.sleep(RETRY_S)
                continue
            if reply.ended:
                return
            findings = ()
            if reply.claims:
                async with self._turns.checking():
                    findings = tuple(await asyncio.to_thread(self._check, reply.claims[:PASS_EPISODES]))
                self.num_checked += len(findings)

    def _check(self, claims: Sequence[Claim]) -> list[Finding]:
        if self._checker is None:
            self._checker = self._make()
        return self._checker.check(claims)
