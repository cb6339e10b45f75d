"""Spreading the roster over the fabric: everybody tells all at once, and pairs compare notes about what was lost.

    announce ──▶ publish own record and grant on the run's topic ──▶ every node's roster
    every `sync_s` ──▶ compare notes with a random node (`swarm.exchange`): what was lost is made up for

A node that joins asks a few nodes at once. After a partition a node notices by liveliness who comes back: where many
do, it compares notes in quick rounds, with one of them first, and where nearly all do (it was almost alone) it tells
itself again; so a healed network agrees within two or three seconds.

Invariants: on the topic a node speaks for itself; only proofs of equivocation, grants and revocations are passed on
there. What arrives is bounded in bytes and number, and in rate by its (proven) sender; those whom nobody granted
anything share one rate. Every second exchange is with a node whose grant is known, or the root: whoever makes nodes
look present, which takes no signature, cannot keep a node from those who are. All tasks belong to the context manager,
and end with it.

Not covered: publications may be lost and a node may be unreachable, so views differ for a while; nothing here decides
by majority or order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
from blake3 import blake3

from shoal.errors import NetworkError, RecordError
from shoal.fabric.alive import AliveWatch
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.topic import Message, Subscription
from shoal.protocol.codec import decode, encode
from shoal.protocol.roster import Bundle, NodeRecord, SignedRecord
from shoal.swarm.exchange import Exchange
from shoal.swarm.pace import DEFAULT_PACE, Pace, slowdown
from shoal.swarm.rate import RateLimiter
from shoal.swarm.roster import Roster
from shoal.swarm.signing import sign

log = logging.getLogger("shoal.swarm")

MAX_PUBLICATION_BYTES = 320 * 1024
"""A full revocation list, or a record with its grant."""

MAX_PUBLISHED = 8
"""Grants and proofs of equivocation in one publication."""

SENDER_RATE_PER_S, SENDER_BURST = 4.0, 32.0
STRANGER_RATE_PER_S, STRANGER_BURST = 50.0, 200.0
"""Together, for all senders without a grant: enough for a crowd that joins, too little to keep a node busy."""

HEAL_ROUNDS = 6
"""Quick exchanges after many nodes came back. News doubles its hearers each round, and half have it already."""

QUIET_ROUNDS = 2
"""After so many exchanges in a row that brought nothing, the rest is left to the regular ones."""

RETURNING_S = 1.5
"""How long the others may take to come back, one after the other, before what was missed is asked for: a link is
dialled again within a second, and what is told before somebody is back has to be told again."""

DEEP_SHARE = 1 / 8
"""Exchanges that compare digests though the summaries may agree: they cost some 200 bytes a node."""

MAX_LOST = 8192
"""Nodes remembered as lost; the rest come back without being noticed as such."""


class Gossip:
    """One node's part in spreading the roster: `async with Gossip(fabric, roster, profile) as gossip: …`."""

    def __init__(
        self,
        fabric: Fabric,
        roster: Roster,
        profile: NodeRecord | None,
        *,
        pace: Pace = DEFAULT_PACE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            profile: what to say of oneself (see `announce`), or `None` to listen only.
            clock: Unix seconds.
        """
        self.fabric = fabric
        self.roster = roster
        self.counters: Counter[str] = Counter()
        self._key = fabric.identity.public_key
        self._prefix = swarm_prefix(roster.run)
        self._profile = profile
        self._own: SignedRecord | None = None
        self._pace = pace
        self._clock = clock
        self._random = random.Random()
        self._changed = asyncio.Condition()
        self._renew = asyncio.Event()
        self._heal = asyncio.Event()
        self._returned: set[str] = set()
        self._lost: set[str] = set()
        self._unspread: set[bytes] = set()
        self._warn = asyncio.Event()
        self._rates = RateLimiter(SENDER_RATE_PER_S, SENDER_BURST)
        self._strangers = RateLimiter(STRANGER_RATE_PER_S, STRANGER_BURST)
        self._exchange = Exchange(
            fabric,
            roster,
            self._prefix,
            take=self._take_in_steps,
            ration=lambda sender: self._rates.take(sender, clock()),
            clock=clock,
            deadline_s=pace.deadline_s,
        )
        self._watch: AliveWatch | None = None
        self._runner: asyncio.Task[None] | None = None

    def announce(self, profile: NodeRecord, *, soon: bool = True) -> None:
        """Say this of oneself from now on. Key, run, sequence number and time are filled in.

        Args:
            soon: tell it within `settle_s`; otherwise it goes with the next record, within `refresh_s`, at no cost.
        """
        self._profile = profile
        if soon:
            self._renew.set()

    async def spread(self, bundle: Bundle) -> None:
        """Take in, and tell everybody: the root's grants and revocation lists, or proofs against a node."""
        self._take(bundle, None)
        await self._publish(bundle)

    async def changed(self, since: int) -> int:
        """Wait until the roster's revision is another than `since`; returns it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.roster.revision != since)
        return self.roster.revision

    async def sync_with(self, node_id: str, *, deep: bool = False) -> bool:
        """Compare notes with one node; whether it answered.

        Args:
            deep: also where the newest records agree (see `Exchange.with_node`).
        """
        try:
            await self._exchange.with_node(node_id, deep)
        except (NetworkError, TimeoutError) as error:
            self.counters["sync_failed"] += 1
            log.debug("no exchange with %s: %s", node_id, error)
            return False
        except RecordError as error:
            self.counters["sync_malformed"] += 1
            log.info("node %s sent nonsense: %s", node_id, error)
            return False
        finally:
            await self._notify()
        self.counters["sync"] += 1
        return True

    async def __aenter__(self) -> Self:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._runner = asyncio.create_task(self._run(ready))
        try:
            await asyncio.wait((self._runner, ready), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._runner.cancel()
            raise
        if self._runner.done():
            await self._runner
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        profile, self._profile = self._profile, None
        if profile is not None and not self._runner.done():
            with contextlib.suppress(TimeoutError):  # The network takes nothing: nobody hears a goodbye.
                async with asyncio.timeout(1.0):
                    await self._tell(profile, 0.0)
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner

    async def _run(self, ready: asyncio.Future[None]) -> None:
        topic = self.fabric.subscribe(
            f"{self._prefix}/news", 1024, max_bytes=MAX_PUBLICATION_BYTES, allow=self._may_speak
        )
        async with topic, self.fabric.watch_alive() as watch:
            self._watch = watch
            service = await self._exchange.serve(self._may_speak)
            try:
                await self.fabric.declare_alive()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._follow(watch))
                    tasks.create_task(self._listen(topic))
                    tasks.create_task(self._tell_regularly())
                    tasks.create_task(self._sync_regularly())
                    tasks.create_task(self._heal_when_needed())
                    tasks.create_task(self._warn_when_needed())
                    ready.set_result(None)
            finally:
                await service.close()

    async def _follow(self, watch: AliveWatch) -> None:
        async for change in watch:
            if change.node_id == self.fabric.identity.node_id:
                continue
            self.roster.note_alive(change.node_id, change.alive, self._clock())
            if not change.alive and len(self._lost) < MAX_LOST:
                self._lost.add(change.node_id)
            elif change.alive and change.node_id in self._lost:
                self._lost.discard(change.node_id)
                self._returned.add(change.node_id)
                self._heal.set()
            await self._notify()

    async def _listen(self, topic: Subscription) -> None:
        async for message in topic:
            self._hear(message)
            await self._notify()

    def _hear(self, message: Message) -> None:
        if not self._rates.take(message.sender_key, self._clock()):
            self.counters["rate"] += 1
            return
        try:
            bundle = decode(message.body, Bundle, max_bytes=MAX_PUBLICATION_BYTES)
        except RecordError:
            self.counters["malformed"] += 1
            return
        if (
            len(bundle.records) > 1
            or max(len(bundle.grants), len(bundle.evidence)) > MAX_PUBLISHED
            or any(signed.signer != message.sender_key for signed in bundle.records)
        ):
            self.counters["malformed"] += 1
            return
        self._take(bundle, message.sender_key)

    def _take(self, bundle: Bundle, sender: bytes | None) -> None:
        now = self._clock()
        if bundle.revocations is not None:
            self.counters[f"revocations.{self.roster.grants.merge_revocations(bundle.revocations, now)}"] += 1
            self.roster.revision += 1
        for grant in bundle.grants:
            self.counters[f"grant.{self.roster.grants.merge_grant(grant, now)}"] += 1
        for proof in bundle.evidence:
            self.roster.merge_evidence(proof, now)
            self._unspread.discard(proof.first.signer)
        for signed in bundle.records:
            verdict = self.roster.merge(signed, now, directly=signed.signer == sender)
            if verdict == "equivocation":
                log.warning("node %s says two things at once and is refused from now on", node_id_of(signed.signer))
                self._unspread.add(signed.signer)
                self._warn.set()
            elif verdict == "new" and signed.signer == self._key:
                self._renew.set()  # A record of an earlier life, from a clock that was ahead: go on from there.

    async def _tell_regularly(self) -> None:
        while True:
            self._renew.clear()
            slower = slowdown(self._pace, len(self.roster.entries))
            if self._profile is not None:
                await self._tell(self._profile, self._pace.ttl_s * slower)
            await asyncio.sleep(self._pace.settle_s)
            wait_s = self._pace.refresh_s * slower * self._random.uniform(0.8, 1.0) - self._pace.settle_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wait_s)):
                    await self._renew.wait()

    async def _tell(self, profile: NodeRecord, ttl_s: float) -> None:
        """Sign a new record of oneself, take it in and publish it."""
        now = self._clock()
        record = msgspec.structs.replace(
            profile,
            run=self.roster.run,
            public_key=self._key,
            # Milliseconds, so that a restarted node goes on from where it was without keeping a file.
            sequence=max(self.roster.newest_sequence(self._key) + 1, int(now * 1000)),
            issued_at=now,
            ttl_s=ttl_s,
        )
        self._own = sign(self.fabric.identity, record)
        self.counters[f"own.{self.roster.merge(self._own, now, directly=True)}"] += 1
        self.roster.note_alive(self.fabric.identity.node_id, ttl_s > 0, now)
        await self._tell_again()
        await self._notify()

    async def _tell_again(self) -> None:
        if self._own is not None:
            grant = self.roster.grants.presentable(self._key, self._clock())
            await self._publish(Bundle(records=(self._own,), grants=() if grant is None else (grant,)))

    async def _publish(self, bundle: Bundle) -> None:
        try:
            await self.fabric.publish(f"{self._prefix}/news", encode(bundle))
        except NetworkError as error:
            self.counters["publish_failed"] += 1
            log.debug("not published: %s", error)

    async def _sync_regularly(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.1))
        first = self._choose(self._pace.join_peers)
        await asyncio.gather(*(self.sync_with(node_id, deep=True) for node_id in first))
        while True:
            # Until somebody is there to ask, look again soon: a node that joins learns of the others within moments.
            pause_s = self._pace.sync_s if first else 0.1
            await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.5))
            self.roster.sweep(self._clock())
            for node_id in (chosen := self._choose(1 if first else self._pace.join_peers)):
                await self.sync_with(node_id, deep=self._random.random() < DEEP_SHARE)
            first = first or chosen

    async def _heal_when_needed(self) -> None:
        while True:
            await self._all_returned()
            returned, self._returned = self._returned, set()
            present = self.present
            if 4 * len(returned) < len(present):
                continue  # A few came back: they tell themselves, and the regular exchanges do for the rest.
            if 4 * len(returned) >= 3 * len(present):
                # It was nearly alone. In a more even split one exchange brings all at less cost.
                await self._tell_again()
            first = sorted(returned & present)
            num_quiet = 0
            for others in (first, *([None] * (HEAL_ROUNDS - 1))):
                revision = self.roster.revision
                chosen = self._choose(1, others)
                # No answer: the network may be cut again, and who waits on has no ear for its next mending.
                answered = [await self.sync_with(node_id, deep=others is first) for node_id in chosen]
                num_quiet = num_quiet + 1 if self.roster.revision == revision else 0
                if num_quiet == QUIET_ROUNDS or not all(answered):
                    break
                await asyncio.sleep(self._pace.heal_s * self._random.uniform(0.5, 1.5))

    async def _all_returned(self) -> None:
        """Wait until nodes have come back, and then until none has for a moment."""
        await self._heal.wait()
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + RETURNING_S
        while self._heal.is_set() and loop.time() < give_up_at:
            self._heal.clear()
            await asyncio.sleep(self._pace.heal_s * self._random.uniform(0.5, 1.5))
        self._heal.clear()

    async def _warn_when_needed(self) -> None:
        while True:
            await self._warn.wait()
            await asyncio.sleep(self._random.uniform(0.0, self._pace.warn_s))
            self._warn.clear()
            while self._unspread:
                proof = self.roster.evidence.get(self._unspread.pop())
                if proof is not None:
                    await self._publish(Bundle(evidence=(proof,)))

    def _choose(self, number: int, among: list[str] | None = None) -> list[str]:
        """Whom to compare notes with: by half, the root and those in the roster that it granted something."""
        present = sorted(self.present) if among is None else among
        grants, now = self.roster.grants, self._clock()
        granted = {node_id_of(grants.root), *(node_id_of(k) for k in self.roster.entries if grants.is_granted(k, now))}
        vouched = [node_id for node_id in present if node_id in granted]
        chosen = self._random.sample(vouched, min((number + self._random.randint(0, 1)) // 2, len(vouched)))
        others = [node_id for node_id in present if node_id not in chosen]
        return chosen + self._random.sample(others, min(number - len(chosen), len(others)))

    @property
    def present(self) -> frozenset[str]:
        """Ids of the other nodes that the fabric sees."""
        watch = self._watch
        return watch.present - {self.fabric.identity.node_id} if watch is not None else frozenset()

    async def _take_in_steps(self, bundle: Bundle) -> None:
        """Take in many records without holding up the loop for all their signatures."""
        self._take(Bundle(grants=bundle.grants, evidence=bundle.evidence, revocations=bundle.revocations), None)
        for start in range(0, len(bundle.records), 16):
            await asyncio.sleep(0)
            self._take(Bundle(records=bundle.records[start : start + 16]), None)
        await self._notify()

    def _may_speak(self, sender: bytes) -> bool:
        now = self._clock()
        return self.roster.grants.is_granted(sender, now) or self._strangers.take(b"", now)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def swarm_prefix(run: str) -> str:
    """Where the nodes of a run meet. A run's name may hold what a key may not, so it is hashed."""
    return f"swarm/{blake3(run.encode()).hexdigest(12)[:24]}"
