"""Trials leased to other nodes: one node asks, whoever is free runs them, and the evidence comes back signed.

    asker: TrialDesk                                         replayer: any node with the world and the weights
    lease    ◀── "I have these families"                     ──▶ an entry, and numbers of trials
    beat     ◀── how many are done                           ──▶ goes on, or drop it
    hand-in  ◀── signed trials                               ──▶ Keeper.report

The desk makes no connection of its own: replayers come and ask, so they may be behind any NAT.

Invariants: each number is at any moment free, leased to one node, or in the store, so nothing is lost when a replayer
dies and nothing counts twice when one that was thought dead hands in after all; a trial is taken only if it is what its
number says (task, seed, weights, configuration) and its runner signed it; a lease that shows no progress expires.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.errors import NetworkError, RecordError
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request
from shoal.memory.admission import Decision
from shoal.memory.keeper import Keeper
from shoal.memory.records import MAX_NAME_CHARS, Entry, check_hash, check_name
from shoal.memory.signing import SignedTrial
from shoal.memory.trials import Arena
from shoal.planning.leases import LeaseBook
from shoal.protocol.codec import Record, decode, encode

log = logging.getLogger("shoal.memory")

MAX_LEASED = 64
"""Trials in one lease."""

MAX_FAMILIES = 256
MAX_WANT_BYTES = 256 * 1024
MAX_HAND_IN_BYTES = 4 * 2**20
TICK_S = 0.5
IDLE_S = 1.0
"""A replayer for which there is nothing to do asks again after this."""


def desk_key(node: str, what: str) -> str:
    """Where a node's desk is asked for `lease`, `beat` and `hand-in`."""
    return f"memory/{node}/{what}"


class Want(Record, frozen=True):
    """A free replayer: the families that it can run, each with the hash of its arena's configuration."""

    model: str
    families: dict[str, str]
    most: int
    """Trials that it takes at once."""

    def check(self) -> None:
        check_name(self.model, "a model")
        if len(self.families) > MAX_FAMILIES or not 1 <= self.most <= MAX_LEASED:
            raise RecordError("a replayer names too many families, or takes too many trials.")
        if any(len(name) > MAX_NAME_CHARS or len(config) > MAX_NAME_CHARS for name, config in self.families.items()):
            raise RecordError("a replayer's family or configuration has too long a name.")


class TrialLease(Record, frozen=True):
    """Numbers of trials to run of one entry."""

    id: str
    entry: Entry
    salt: str
    numbers: tuple[int, ...]
    duration_s: float
    """Without progress it is somebody else's after this."""

    def check(self) -> None:
        self.entry.check()
        check_name(self.salt, "a salt")
        if not 1 <= len(self.numbers) <= MAX_LEASED or min(self.numbers) < 0 or max(self.numbers) >= 2**31:
            raise RecordError("a lease has no trials, too many, or impossible ones.")
        if not 0 < self.duration_s <= 86400:
            raise RecordError("a lease's duration is out of range.")


class Leased(Record, frozen=True):
    """What a replayer is answered."""

    lease: TrialLease | None = None
    wait_s: float = IDLE_S

    def check(self) -> None:
        if self.lease is not None:
            self.lease.check()
        if not 0 <= self.wait_s <= 3600:
            raise RecordError("a desk lets a replayer wait too long.")


class Beat(Record, frozen=True):
    """A replayer is at work."""

    lease: str
    done: int
    """Trials run so far."""


class HandIn(Record, frozen=True):
    """The end of a lease: what was run of it."""

    lease: str
    entry: str
    trials: tuple[SignedTrial, ...] = ()

    def check(self) -> None:
        check_hash(self.entry, "an entry's id")
        if len(self.trials) > MAX_LEASED:
            raise RecordError(f"more than {MAX_LEASED} trials are handed in at once.")
        for trial in self.trials:
            trial.check()


class Answer(Record, frozen=True):
    """Whether a lease goes on, or was taken."""

    accepted: bool


@dataclass
class _Candidate:
    """An entry under test."""

    entry: Entry
    arena: Arena
    ended: asyncio.Future[Decision]
    known: set[str]
    """Ids of trials that are in the store."""
    free: list[int] = field(default_factory=list)
    """Numbers that came back without a trial, largest first."""
    next: int = 0
    out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Lease -> its numbers."""


class TrialDesk:
    """One node's desk: it gives out the trials of its candidates.

    Args:
        admits: whether the node with a key may run trials for this one.
        lease_s: a replayer that has finished no trial for so long loses its lease.
        most: trials in a lease.
    """

    def __init__(
        self,
        fabric: Fabric,
        keeper: Keeper,
        admits: Callable[[bytes], bool],
        *,
        lease_s: float = 60.0,
        most: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fabric, self._keeper, self._admits = fabric, keeper, admits
        self._lease_s, self._most, self._clock = lease_s, min(most, MAX_LEASED), clock
        self._candidates: dict[str, _Candidate] = {}
        self.book = LeaseBook()
        """Counted in trials."""
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer replayers."""
        node = self._fabric.identity.node_id
        for what, answer in (("lease", self._lease), ("beat", self._beat), ("hand-in", self._hand_in)):
            limit = MAX_HAND_IN_BYTES if what == "hand-in" else MAX_WANT_BYTES
            await self._fabric.serve(desk_key(node, what), answer, max_bytes=limit, allow=self._admits)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Stop; candidates without a decision stay candidates, and go on when they are offered again."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for candidate in self._candidates.values():
            candidate.ended.cancel()

    async def admit(self, entry: str, arena: Arena) -> Decision:
        """Have a candidate's trials run by whoever comes, until they decide.

        The arena says which trials these are; its sampler is not used.

        Raises:
            RecordError: there is no such entry.
            ConfigError: its task has no siblings to try it on.
        """
        memory = self._keeper.memory(entry)
        # Found out by a replayer's question, it would leave that without an answer, and all other candidates untried.
        arena.sibling(memory.entry, self._keeper.store.node, 0)
        decision = self._keeper.report(memory.id, [])
        if decision.verdict != "continue":
            return decision
        ended: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        known = set(self._keeper.store.trials(memory))
        candidate = self._candidates.setdefault(memory.id, _Candidate(memory.entry, arena, ended, known))
        return await asyncio.shield(candidate.ended)

    @property
    def num_open(self) -> int:
        """Candidates under test."""
        return len(self._candidates)

    # -- what replayers ask

    async def _lease(self, request: Request) -> bytes:
        want = decode(request.body, Want, max_bytes=MAX_WANT_BYTES)
        self._expire()
        for candidate in sorted(self._candidates.values(), key=lambda c: len(c.out)):
            arena = candidate.arena
            if want.families.get(arena.family) != arena.config or want.model != arena.model:
                continue
            numbers = self._take(candidate, min(want.most, self._most))
            if not numbers:
                continue
            name = secrets.token_hex(8)
            candidate.out[name] = numbers
            self.book.grant(name, request.sender, len(numbers), self._lease_s, self._clock())
            lease = TrialLease(
                id=name,
                entry=candidate.entry,
                salt=self._keeper.store.node,
                numbers=numbers,
                duration_s=self._lease_s,
            )
            return encode(Leased(lease=lease))
        return encode(Leased())

    def _take(self, candidate: _Candidate, most: int) -> tuple[int, ...]:
        """Numbers to lease: those that came back first; no more under way than could still be needed."""
        left = self._keeper.policy.max_trials - len(candidate.known) - sum(map(len, candidate.out.values()))
        numbers: list[int] = []
        while len(numbers) < min(most, left):
            if candidate.free:
                numbers.append(candidate.free.pop())
                continue
            number, candidate.next = candidate.next, candidate.next + 1
            if candidate.arena.id_of(candidate.entry, self._keeper.store.node, number) not in candidate.known:
                numbers.append(number)
        return tuple(numbers)

    async def _beat(self, request: Request) -> bytes:
        beat = decode(request.body, Beat, max_bytes=MAX_WANT_BYTES)
        goes_on = self.book.progress(beat.lease, request.sender, beat.done, self._clock())
        return encode(Answer(accepted=goes_on and self._holder(beat.lease) is not None))

    async def _hand_in(self, request: Request) -> bytes:
        handed = decode(request.body, HandIn, max_bytes=MAX_HAND_IN_BYTES)
        self._expire()
        candidate = self._holder(handed.lease)
        holding = self.book.running.get(handed.lease)
        if candidate is None or holding is None or holding.node_id != request.sender:
            return encode(Answer(accepted=False))
        numbers = candidate.out.pop(handed.lease)
        wanted = {candidate.arena.id_of(candidate.entry, self._keeper.store.node, n): n for n in numbers}
        own = (one for one in handed.trials if one.signer == request.sender_key)
        taken = {one.trial.id: one for one in own if one.trial.id in wanted}
        try:
            decision = self._keeper.report(candidate.entry.id, list(taken.values()))
        except RecordError as error:
            log.warning("trials of node %s are refused: %s", request.sender, error)
            taken, decision = {}, None
        lacking = [n for name, n in wanted.items() if name not in taken]
        candidate.free = sorted({*candidate.free, *lacking}, reverse=True)
        candidate.known |= set(taken)
        self._finish(handed.lease, len(taken))
        if decision is not None and decision.verdict != "continue":
            self._conclude(candidate, decision)
        return encode(Answer(accepted=decision is not None))

    def _finish(self, lease: str, taken: int) -> None:
        holding = self.book.running[lease]
        self.book.finish(lease, holding.node_id, accepted=taken, rejected=0, void=holding.rollouts - taken)

    # -- within

    def _holder(self, lease: str) -> _Candidate | None:
        return next((candidate for candidate in self._candidates.values() if lease in candidate.out), None)

    def _conclude(self, candidate: _Candidate, decision: Decision) -> None:
        del self._candidates[candidate.entry.id]
        for lease in candidate.out:
            # What is still under way is not needed any more; its replayer hears so at its next beat.
            self._finish(lease, 0)
        if not candidate.ended.done():
            candidate.ended.set_result(decision)

    def _expire(self) -> None:
        for holding in self.book.expire(self._clock()):
            candidate = self._holder(holding.lease_id)
            if candidate is not None:
                numbers = candidate.out.pop(holding.lease_id)
                candidate.free = sorted({*candidate.free, *numbers}, reverse=True)
                log.info("%d trials of node %s are free again", len(numbers), holding.node_id)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._expire()


async def ask_desk(fabric: Fabric, desk: bytes, node: str, what: str, body: Record, deadline_s: float) -> bytes:
    """One question to a desk; raises `NetworkError` where it does not answer."""
    answer = await fabric.ask(
        desk_key(node, what), encode(body), deadline_s, desk, max_reply_bytes=MAX_WANT_BYTES, absent_grace_s=0.2
    )
    if answer.sender != node:
        raise NetworkError(f"node {answer.sender} answers for node {node}.")
    return answer.body
