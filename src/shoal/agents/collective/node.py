"""One node of a collective: it poses problems, writes chains, does steps and keeps the ledger. Nobody is in charge.

    posing       find planners, watch over them, weigh and vote         `posing`
    planning     write chains, give steps away, watch leases            `commissions`, `chains`
    executing    take steps, do them, hand the next one over            `executor`
    attesting    set others tasks whose answers can be scored           here
    sharing      one ledger for all                                     `sharing`

Every node runs the same; one without an expert only asks.

Symphony: arXiv 2508.20019. Deviations: (1) chains are watched over by the planners that wrote them, so the death of an
executor costs one lease and not the chain; (2) the poser computes the weights, from its own copy of the ledger and the
executors' signatures, so that no planner can credit somebody else's name; (3) skills are attested (`planning.skills`).

Invariants: calibration tasks look like any other step; nothing of this node outlives its context.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from shoal.agents.collective.chain import Chain
from shoal.agents.collective.chains import LEASE_S, Chains
from shoal.agents.collective.commissions import Commissions, OnPlan
from shoal.agents.collective.executor import Executor, OnWork
from shoal.agents.collective.market import LISTENS_S, Market
from shoal.agents.collective.patience import Asking
from shoal.agents.collective.posing import PLANNING, Poser
from shoal.agents.collective.sharing import OwnEntries, Sharing
from shoal.agents.collective.work import Expert, PlannedStep, Writer
from shoal.errors import RecordError
from shoal.planning.skills import Tally
from shoal.protocol.collective import MAX_CLAIMS
from shoal.protocol.episode import Task
from shoal.protocol.ledger import MAX_ANSWER_CHARS, MAX_SKILL_CHARS, Attestation, Contribution
from shoal.protocol.roster import MAX_SKILLS_CHARS
from shoal.swarm.ledger import Ledger
from shoal.swarm.member import Member

log = logging.getLogger("shoal.collective")


def write_skills(skills: Iterable[str]) -> str:
    """Skills as a node's record states them, as many as it can hold."""
    text = "; ".join(skill.replace(";", ",") for skill in skills)
    return text if len(text) <= MAX_SKILLS_CHARS else text[:MAX_SKILLS_CHARS].rpartition(";")[0]


def read_skills(text: str) -> list[str]:
    """Skills of a node's record."""
    return [skill for part in text.split(";") if (skill := part.strip()) and len(skill) <= MAX_SKILL_CHARS]


class CollectiveNode:
    """`async with CollectiveNode(member, …) as node: await node.solve("…", planners=3)`.

    Args:
        member: this node's part in the run's swarm.
        expert: does steps; None: this node does none.
        writer: writes chains; None: this node plans none.
        similar: how alike a requirement and a skill are, 0 to 1.
        slots: steps at once.
        on_work, on_plan: told of steps and chains that were done here (`episodes`).
        own: where what this node says is kept, if its identity outlives the process.
    """

    def __init__(
        self,
        member: Member,
        run: str,
        *,
        expert: Expert | None,
        writer: Writer | None,
        similar: Callable[[str, str], float],
        slots: int = 1,
        price_usd: float = 0.0,
        lease_s: float = LEASE_S,
        listens_s: float = LISTENS_S,
        share_every_s: float = 2.0,
        on_work: OnWork | None = None,
        on_plan: OnPlan | None = None,
        own: OwnEntries | None = None,
    ) -> None:
        self._member = member
        self._fabric = member.fabric
        self.ledger = Ledger(run, member.is_granted)
        self._own = own
        self._counted: dict[bytes, int] = {}
        self._convicted: frozenset[bytes] = frozenset()
        self._tally = Tally()
        asking = Asking(self._fabric)
        self.executor = Executor(asking, run, expert, slots=slots, price_usd=price_usd, on_work=on_work)
        self._market = Market(
            asking,
            admits=member.is_granted,
            others=lambda: len(self.peers()),
            offer=self.executor.offer,
            tally=self.tally,
            similar=similar,
            listens_s=listens_s,
        )
        self.chains = Chains(asking, run, self._market, self._credit, lease_s=lease_s)
        self._sharing = Sharing(asking, self.ledger, self.peers, share_every_s)
        self._commissions = Commissions(asking, self.chains, writer, self.skills, on_plan)
        self._poser = Poser(asking, run, self._market, tally=self.tally, similar=similar, is_here=self._is_here)
        self.solve = self._poser.solve
        self.told = self._poser.told
        self.choose = self._market.choose
        self._background: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    def skills(self) -> list[str]:
        """What a chain's steps may require: what is attested, or, while nothing is, what agents say of themselves."""
        attested = [skill for skill in self.tally().skills if skill != PLANNING]
        if attested:
            return attested
        told = {skill for node in self._member.nodes("agent") for skill in read_skills(node.record.skills)}
        return sorted(told)[:MAX_CLAIMS]

    def tally(self) -> Tally:
        """The ledger's entries, counted up to now."""
        if self.ledger.convicted != self._convicted:
            # What a convicted signer said counts no more: count the rest again.
            self._convicted, self._counted, self._tally = self.ledger.convicted, {}, Tally()
        for key in self.ledger.signers:
            for entry in self.ledger.since(key, self._counted.get(key, 0)):
                self._tally.add(key, entry)
                self._counted[key] = entry.sequence
        return self._tally

    # Attesting

    async def calibrate(
        self, subject: bytes, skill: str, task: Task, words: str, score: Callable[[str], float], timeout_s: float = 60.0
    ) -> float | None:
        """Set one node a task whose answer can be scored, as a step like any other; attest how it did.

        Args:
            words: the task, as its executor reads it.
            score: of a result, 0 to 1.

        Returns:
            The score; None where the node did not bring a result (which counts against its standing).
        """
        chain = Chain(
            secrets.token_hex(8), secrets.token_hex(8), [PlannedStep(skill, words)], time.monotonic() + timeout_s
        )
        result = await self.chains.run(chain, first=subject)
        if result.answer is None:
            return None
        found = min(max(score(result.answer), 0.0), 1.0)
        what = Attestation(skill=skill, task=task, answer=result.answer[:MAX_ANSWER_CHARS], score=found)
        self._say(subject, what)
        await self.chains.judge(chain.id, found)
        return found

    def _credit(self, executor: bytes, what: Contribution) -> None:
        if executor != self._fabric.identity.public_key:
            try:
                self._say(executor, what)
            except RecordError as error:
                log.warning("a contribution is not in the ledger: %s", error)

    def _say(self, subject: bytes, what: Attestation | Contribution) -> None:
        signed = self.ledger.write(self._fabric.identity, subject, what, time.time())
        if self._own is not None:
            self._own.keep(signed)

    # Life

    @property
    def id(self) -> str:
        """Its node id."""
        return self._fabric.identity.node_id

    def name_of(self, node_id: str) -> str:
        """What a node calls itself; its id where that is not known."""
        found = self._member.node(node_id)
        return found.record.name or node_id if found is not None else node_id

    @property
    def num_peers(self) -> int:
        """Other agents that are here."""
        return len(self.peers())

    def peers(self) -> list[bytes]:
        """Public keys of the other agents that are here."""
        own = self._fabric.identity.public_key
        return [node.record.public_key for node in self._member.nodes("agent") if node.record.public_key != own]

    def _is_here(self, key: bytes) -> bool:
        return key in self.peers()

    async def __aenter__(self) -> Self:
        admits = self._member.is_granted
        for signed in self._own or ():
            self.ledger.merge(signed)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._market)
            stack.push_async_callback(self.executor.close)
            stack.push_async_callback(self._commissions.close)
            stack.push_async_callback(self._poser.close)
            await self.executor.start(self._market, admits)
            await self.chains.start(admits)
            await self._commissions.start(admits)
            await self._poser.start(admits)
            await self._sharing.start(admits)
            self._stack = stack.pop_all()
        self._background = asyncio.create_task(self._sharing.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)
        await self._stack.aclose()
