"""A poser's part: find planners, watch over them, weigh what their chains say, and vote.

    choose(PLANNING) ──▶ Commission × M ──▶ ChainResult × M ──▶ weights from the ledger ──▶ `selection.vote` ──▶ Judged

A planner that falls silent, or whose chain cannot be finished, is replaced by the next best while there is time; what
it brings after all still counts, for it may only have been slow, or cut off for a while. What a chain was worth is told
to those who took part in it: whether its answer was the one that won, or, where the poser can score answers, its score.

Invariants: a problem ends by its deadline, and before it only with as many answers as were wanted, or after `MAX_TRIES`
chains; a chain counts once, and only from the planner that it was commissioned from; the weights are the poser's own,
from its ledger and the executors' signatures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.agents.collective.answers import canonical
from shoal.agents.collective.executor import MAX_BYTES, digest
from shoal.agents.collective.market import Market
from shoal.agents.collective.patience import Asking
from shoal.errors import NetworkError, RecordError
from shoal.fabric.errors import RemoteError
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.planning.selection import Ballot, Chosen, match, vote
from shoal.planning.skills import Tally
from shoal.protocol.codec import decode, encode
from shoal.protocol.collective import (
    ChainResult,
    Commission,
    Judged,
    Place,
    Progress,
    StepDone,
    StepView,
    Underway,
)
from shoal.swarm.signing import verified

log = logging.getLogger("shoal.collective")

PLANNING = "planning: break a problem into steps"
"""What a planner is asked for, and attested for."""

ASK_S = 5.0
WATCH_S = 1.0
"""How often a poser asks its planners whether they are still at it; an answer may take longer (`patience`)."""

SILENT = 3
"""Questions' times without an answer, after which a planner that is gone is given up."""

PATIENT = 3
"""Times as many, while its connection stands: it may only be busy."""

MAX_TRIES = 512
"""Chains that are commissioned for one problem: where nobody's model writes one, that is not tried for ever."""


def commission_key(node: str) -> str:
    """Where a node is asked for a chain."""
    return f"collective/{node}/commission"


def underway_key(node: str) -> str:
    """Where a planner says which chains it is still at."""
    return f"collective/{node}/underway"


def result_key(node: str) -> str:
    """Where a poser hears how chains ended."""
    return f"collective/{node}/result"


def judged_key(node: str) -> str:
    """Where a planner hears what its chains were worth."""
    return f"collective/{node}/judged"


OnProgress = Callable[[str, str, Sequence[StepView]], None]
"""Told how far chains are: chain, planner's node id, steps."""


class ChainView(NamedTuple):
    """One chain, as its poser saw it end."""

    chain: str
    planner: str
    answer: str | None
    """As it was said; the vote compares canonical forms."""
    executors: tuple[str, ...]
    weights: tuple[float, ...]
    """Of each step: match times standing of who did it."""
    reason: str
    steps: tuple[StepView, ...] = ()
    """What was asked and said, in its planner's words."""
    tokens: int = 0
    """Of its planner and its executors, as they say."""


@dataclass(frozen=True)
class Solution:
    """What the collective says."""

    problem: str
    answer: str | None
    support: float
    chains: tuple[ChainView, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """That all chains took."""
        return sum(chain.tokens for chain in self.chains)


@dataclass
class _Commissioned:
    """A chain that a planner was asked for."""

    planner: bytes
    heard_at: float
    """Monotonic time of its planner's last word."""
    is_taken: bool = False
    """Whether its planner has said that it has it."""
    is_silent: bool = False
    """Given up, until its planner speaks again."""
    ended: ChainView | None = None


@dataclass
class _Open:
    """A problem that this node has posed."""

    text: str
    chains: dict[str, _Commissioned] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    told: OnProgress | None = None
    watches: list[asyncio.Task[None]] = field(default_factory=list)
    """One a chain."""


class Poser:
    """One node's part as a poser.

    Args:
        tally: what the ledger says now.
        similar: how alike a requirement and a skill are, 0 to 1.
        is_here: whether a node's connection stands, by its key.
    """

    def __init__(
        self,
        asking: Asking,
        run: str,
        market: Market,
        *,
        tally: Callable[[], Tally],
        similar: Callable[[str, str], float],
        is_here: Callable[[bytes], bool],
    ) -> None:
        self._asking = asking
        self._fabric = asking.fabric
        self._run = run
        self._market = market
        self._tally = tally
        self._similar = similar
        self._is_here = is_here
        self._open: dict[str, _Open] = {}
        self._judging: set[asyncio.Task[None]] = set()

    async def start(self, admits: Callable[[bytes], bool]) -> None:
        """Begin to hear results."""
        key = result_key(self._fabric.identity.node_id)
        await self._fabric.serve(key, self._take_result, max_bytes=MAX_BYTES, allow=admits)

    async def close(self) -> None:
        """Tell nobody anything any more."""
        for task in self._judging:
            task.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)

    async def told(self) -> None:
        """Wait until planners know what their chains were worth."""
        await asyncio.gather(*self._judging)

    async def solve(
        self,
        text: str,
        *,
        planners: int = 3,
        timeout_s: float = 120.0,
        score: Callable[[str], float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Solution:
        """Have a problem solved by whoever is there.

        Args:
            score: of an answer, 0 to 1, where that can be told; otherwise the answer that wins is taken to be right.
            on_progress: told every second how far the chains are.
        """
        began = time.monotonic()
        deadline = began + timeout_s
        problem = secrets.token_hex(8)
        mine = self._open[problem] = _Open(text, told=on_progress)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._commission(problem, planners, deadline)
            found = self._counted_up(problem, mine, time.monotonic() - began)
        finally:
            del self._open[problem]
            for watch in mine.watches:
                watch.cancel()
            await asyncio.gather(*mine.watches, return_exceptions=True)
        for view in found.chains:
            if view.answer is not None:
                agrees = canonical(view.answer) == canonical(found.answer or "")
                worth = min(max(score(view.answer), 0.0), 1.0) if score is not None else float(agrees)
                self._judge(mine.chains[view.chain].planner, Judged(chain=view.chain, score=worth))
        return found

    def _judge(self, planner: bytes, judged: Judged) -> None:
        async def tell() -> None:
            try:
                # Not by `_asking`: it is answered when the executors have been told.
                limit_s = self._asking.patience.limit_s(ASK_S, planner)
                await self._fabric.request(
                    judged_key(node_id_of(planner)), encode(judged), limit_s, to=planner, max_reply_bytes=16
                )
            except NetworkError as error:
                log.info("a planner does not hear what its chain was worth: %s", error)

        task = asyncio.create_task(tell())
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)

    async def _commission(self, problem: str, planners: int, deadline: float) -> None:
        """Keep `planners` chains going until so many have ended with an answer."""
        mine = self._open[problem]
        tried: set[bytes] = set()
        while True:
            mine.changed.clear()
            answered = sum(one.ended is not None and one.ended.answer is not None for one in mine.chains.values())
            underway = sum(one.ended is None and not one.is_silent for one in mine.chains.values())
            if answered >= planners:
                return
            lacking = min(planners - answered - underway, MAX_TRIES - len(mine.chains))
            if lacking <= 0 and not underway:
                return
            if lacking > 0 and not await self._begin(problem, lacking, deadline, tried):
                tried.clear()  # Everybody had a turn; begin again with those that are left.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await mine.changed.wait()

    async def _begin(self, problem: str, count: int, deadline: float, tried: set[bytes]) -> int:
        """Commission up to `count` more chains, all at once; how many planners agreed."""
        candidates = await self._market.choose(PLANNING, max(0.0, deadline - time.monotonic()), tried)
        begun = 0
        while begun < count and candidates:
            asked, candidates = candidates[: count - begun], candidates[count - begun :]
            tried.update(one.candidate.key for one in asked)
            begun += sum(await asyncio.gather(*(self._ask_for_chain(problem, one, deadline) for one in asked)))
        return begun

    async def _ask_for_chain(self, problem: str, one: Chosen, deadline: float) -> bool:
        """Commission one chain; whether its planner agreed."""
        mine = self._open[problem]
        key, chain = one.candidate.key, secrets.token_hex(8)
        left_s = max(0.0, deadline - time.monotonic())
        body = encode(Commission(problem=problem, chain=chain, text=mine.text, deadline_s=left_s))
        asked = mine.chains[chain] = _Commissioned(key, time.monotonic())
        try:
            await self._asking.request(
                commission_key(one.candidate.id), body, ASK_S, to=key, max_reply_bytes=16, absent_grace_s=0.2
            )
            asked.is_taken, asked.heard_at = True, time.monotonic()
        except RemoteError as error:
            log.info("%s writes no chain: %s", one.candidate.id, error)
            del mine.chains[chain]
            return False
        except NetworkError as error:
            # It may have been heard all the same: then the planner says so when it is asked.
            log.info("%s does not say whether it writes a chain: %s", one.candidate.id, error)
            asked.is_silent = True
        mine.watches.append(asyncio.create_task(self._watch(mine, chain, asked)))
        return asked.is_taken

    async def _watch(self, mine: _Open, chain: str, asked: _Commissioned) -> None:
        """Ask a chain's planner whether it is still at it, until it has ended."""
        key, node = asked.planner, node_id_of(asked.planner)
        body = encode(Underway(chain=chain))
        while asked.ended is None:
            await asyncio.sleep(WATCH_S)
            was_silent = asked.is_silent
            try:
                found = await self._asking.request(
                    underway_key(node), body, WATCH_S, to=key, max_reply_bytes=MAX_BYTES, absent_grace_s=0.2
                )
                progress = decode(found, Progress, max_bytes=MAX_BYTES)
            except (NetworkError, RecordError) as error:
                log.info("planner %s says nothing of its chain: %s", node, error)
                once_s = self._asking.patience.limit_s(WATCH_S)
                patience_s = SILENT * once_s * (PATIENT if self._is_here(key) else 1)
                asked.is_silent = was_silent or time.monotonic() - asked.heard_at > patience_s
            else:
                asked.heard_at = time.monotonic()
                # One that says itself that it has no such chain was started again, or never heard of it.
                asked.is_silent = not progress.here
                asked.is_taken = asked.is_taken or progress.here
                if mine.told is not None and progress.steps:
                    mine.told(chain, node, progress.steps)
            if asked.is_silent and not was_silent:
                mine.changed.set()

    def _counted_up(self, problem: str, mine: _Open, seconds: float) -> Solution:
        views = []
        for chain, one in sorted(mine.chains.items()):
            if one.ended is not None:
                views.append(one.ended)
            elif one.is_silent and one.is_taken:
                views.append(ChainView(chain, node_id_of(one.planner), None, (), (), "its planner fell silent"))
        said: dict[str, str] = {}
        ballots = []
        for view in views:
            form = canonical(view.answer) if view.answer is not None else None
            if form is not None and view.answer is not None:
                said.setdefault(form, view.answer)
            ballots.append(Ballot(view.chain, form, view.weights))
        outcome = vote(ballots)
        answer = said[outcome.answer] if outcome.answer is not None else None
        return Solution(problem, answer, outcome.support, tuple(views), seconds)

    async def _take_result(self, request: Request) -> bytes:
        found = decode(request.body, ChainResult, max_bytes=MAX_BYTES)
        mine = self._open.get(found.problem)
        asked = mine.chains.get(found.chain) if mine is not None else None
        if mine is None or asked is None or asked.planner != request.sender_key or asked.ended is not None:
            return b""
        executors, weights, tokens = self._weighed(found)
        asked.ended = ChainView(
            found.chain,
            request.sender,
            found.answer,
            executors,
            weights,
            found.reason,
            found.steps,
            found.tokens + tokens,
        )
        if mine.told is not None:
            mine.told(found.chain, request.sender, found.steps)
        mine.changed.set()
        return b""

    def _weighed(self, found: ChainResult) -> tuple[tuple[str, ...], tuple[float, ...], int]:
        """Who did the steps, what each one's word weighs, and their tokens.

        Raises:
            RecordError: signatures do not fit.
        """
        if found.answer is None:
            return (), (), 0
        tally = self._tally()
        executors, weights = [], []
        done = [verified(signed, StepDone) for signed in found.done]
        for number, (step, signed) in enumerate(zip(done, found.done, strict=True)):
            if step.run != self._run or step.place != Place(found.problem, found.chain, number):
                raise RecordError("a chain rests on a signature about something else.")
            alike = {skill: self._similar(step.requirement, skill) for skill in tally.skills}
            weights.append(match(tally, signed.signer, alike, {}).mean * tally.standing(signed.signer))
            executors.append(node_id_of(signed.signer))
        if not done or done[-1].result_hash != digest(found.answer):
            raise RecordError("a chain's answer is not what its last executor signed.")
        return tuple(executors), tuple(weights), sum(step.tokens for step in done)
