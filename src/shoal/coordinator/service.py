"""The coordinator on the fabric: who may say what, and the clockwork that nobody has to ask for.

    run/join              anyone who proves an invitation's secret (`admission`)
    run/lease, heartbeat, submit          nodes granted `worker`          run/leave           nodes that have joined
    run/batch, step, audit                nodes granted `learner`         run/ticket, revoke  the run's owner
    run/status (`status`)                 whoever is granted anything

A colocated learner is granted both roles. The owner is who holds the coordinator's own key, which lies in the run's
folder. Invariants: a request of a node that has not joined is refused before it is read; each of the others is acted
on only while the sender's (proven) key is granted the role it needs; a node that dies (liveliness), says goodbye or is
revoked loses its leases at once; every long poll ends within `POLL_S`; what cannot be written to the run's folder ends
the run, because memory and disk would no longer agree; refusals to strangers fill neither memory nor disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any, TypeVar

from shoal.broadcast.chain import open_manifest
from shoal.broadcast.store import Store
from shoal.config import Config
from shoal.coordinator.admission import Admission
from shoal.coordinator.control import Control
from shoal.coordinator.costs import costs
from shoal.coordinator.door import MAX_NODES, Door
from shoal.coordinator.hooks import Hooks
from shoal.coordinator.nodes import Node as Node
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.status import Watch
from shoal.errors import RecordError, ShoalError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Handler, Request
from shoal.planning.activation import Offer
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.roster import NodeRecord, SwarmRole
from shoal.protocol.snapshot import SignedManifest
from shoal.protocol.trust import AuditReply, AuditRequest
from shoal.protocol.work import (
    Ack,
    BatchRequest,
    Heartbeat,
    HeartbeatReply,
    LeaseRequest,
    StepReply,
    StepReport,
    Submission,
    SubmissionReply,
)
from shoal.swarm.member import Member, profile

POLL_S = 5.0
"""The learner's question for a batch is answered within this, with or without one."""

TICK_S = 0.5

SMALL_BYTES = 64 * 2**10
MAX_SUBMISSION_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 64 * 2**20

MAX_SLOTS = 2**16
"""More than any machine samples at once."""

M = TypeVar("M", bound=Record)


class Coordinator:
    """Serves one run.

    Args:
        admission: the run's door.
    """

    def __init__(self, config: Config, control: Control, run: RunDir, fabric: Fabric, admission: Admission) -> None:
        self.config = config
        self.control = control
        self.run = run
        self.admission = admission
        self.member: Member
        self.door: Door
        """The coordinator's part in the swarm, with its roster, and its door: from `start` on."""
        self.nodes: dict[str, Node] = {}
        control.name_of = self.name_of
        self._fabric = fabric
        self.watch = Watch(control, self.nodes, fabric, admission.root.node_id, run.name, self._may_look)
        """How every node is."""
        self._stack = contextlib.AsyncExitStack()
        self._hooks = Hooks(config, run)
        self._changed = asyncio.Condition()
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.started_at = time.monotonic()
        self.first_step_at: float | None = None
        self.steps_at_start = 0
        self.last_metrics: dict[str, float] = {}

    async def start(self) -> None:
        """Begin to answer, in a run that goes on also before its learner can."""
        made = await asyncio.to_thread(self._newest_made)
        if made is not None:
            self.control.resumed(made)
        own = profile(self._fabric, self.run.name, (), name="coordinator")
        root = self.admission.root.public_key
        self.member = Member(self._fabric, self.run.name, root, own, grants=self.admission.grants)
        await self._stack.enter_async_context(self.member)

        async def serve(
            key: str, handler: Handler, max_bytes: int = SMALL_BYTES, *, role: SwarmRole | None = None, **limits: Any
        ) -> None:
            careful = self._careful(handler, role)
            settings: dict[str, Any] = {"allow": self._is_joined, "backlog": MAX_NODES, **limits}
            await self._fabric.serve(f"run/{key}", careful, max_bytes=max_bytes, **settings)

        self.door = Door(self.config, self.control, self.run, self.admission, self.nodes, self.member, self._gone)
        await serve("join", self.door.join, allow=None)
        await serve("lease", self._lease, role="worker")
        await serve("heartbeat", self._heartbeat, 2**20, role="worker")
        await serve("submit", self._submit, MAX_SUBMISSION_BYTES, role="worker", concurrency=4)
        await serve("audit", self._audit, MAX_MANIFEST_BYTES, role="learner")
        await serve("leave", self._leave)
        await serve("batch", self._batch, role="learner")
        await serve("step", self._step, MAX_MANIFEST_BYTES, role="learner")
        await serve("ticket", self.door.ticket, allow=self._is_owner)
        await serve("revoke", self.door.revoke, allow=self._is_owner)
        self.watch.price_of = self._price_of
        self.watch.delays_of = lambda node_id: n.record.delays if (n := self.member.node(node_id)) is not None else {}
        self.control.trust.is_own, self.control.trust.device_of = self._is_own, self._device_of
        clockwork = (self._tick(), self._watch(), self.watch.run())
        self._tasks = [asyncio.create_task(part) for part in clockwork]

    def _newest_made(self) -> int | None:
        """The newest version that the learner has signed in an earlier life of this run."""
        snapshots, learner = self.run.path / "snapshots", self.admission.learner_key
        newest = Store(snapshots, run=self.run.name, trusted_key=learner, read_only=True).latest("policy")
        return None if newest is None else newest.manifest.version

    async def finished(self) -> None:
        """Wait for the run's end.

        Raises:
            ShoalError: the run cannot go on.
        """
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait([over, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
        finally:
            over.cancel()
        if self.control.failure is not None:
            raise self.control.failure

    async def close(self) -> None:
        """Stop the clockwork; the fabric is closed by whoever opened it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._hooks.close()
        await self._stack.aclose()

    async def dismissed(self, deadline_s: float) -> None:
        """Wait until every worker has heard that the run is over and has left, or the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self.workers():
                    async with self._changed:
                        await self._changed.wait()

    def fail(self, error: ShoalError) -> None:
        """End the run with an error; the first one is the one to tell."""
        self.control.failure = self.control.failure or error
        self._over.set()

    def _careful(self, handler: Handler, role: SwarmRole | None) -> Handler:
        async def handle(request: Request) -> bytes:
            if role is not None:
                self.member.require(request.sender_key, role)
            try:
                return await handler(request)
            except StorageError as error:
                self.fail(error)
                raise

        return handle

    # Who may speak

    def _is_joined(self, key: bytes) -> bool:
        return node_id_of(key) in self.nodes

    def _is_owner(self, key: bytes) -> bool:
        return key == self.admission.root.public_key

    def _may_look(self, key: bytes) -> bool:
        """Whoever has any grant may see how the run is."""
        return self._is_owner(key) or self.member.is_granted(key)

    # Workers

    async def _lease(self, request: Request) -> bytes:
        asked = _read(request, LeaseRequest)
        node = self._seen(request.sender)
        node.version = asked.version
        now, free_slots = time.monotonic(), max(0, min(asked.free_slots, MAX_SLOTS))
        self.control.provisioning.holds(request.sender, asked.version, now)
        return encode(self.control.lease(request.sender, free_slots, now))

    async def _heartbeat(self, request: Request) -> bytes:
        beat = _read(request, Heartbeat)
        node = self._seen(request.sender)
        node.version, node.tokens_per_s, node.fetching = beat.version, beat.tokens_per_s, beat.fetching
        for arrived in beat.arrived:
            self.run.event("snapshot.arrived", request.sender, **node.came(arrived, self.name_of))
        now = time.monotonic()
        self.control.provisioning.holds(request.sender, beat.version, now)
        gone = self.control.heartbeat(request.sender, beat.leases, now)
        newest = max(0, self.control.published)
        return encode(HeartbeatReply(gone=gone, newest_version=newest, ended=self.control.ended))

    async def _submit(self, request: Request) -> bytes:
        submission = decode(request.body, Submission, max_bytes=MAX_SUBMISSION_BYTES)
        self._seen(request.sender)
        verdicts = await self.control.submit(submission, request.sender, time.monotonic())
        await self._notify()
        return encode(SubmissionReply(verdicts=verdicts))

    async def _leave(self, request: Request) -> bytes:
        self._gone(request.sender, "left")
        await self._notify()
        return encode(Ack())

    def _seen(self, node_id: str) -> Node:
        node = self.nodes[node_id]
        node.seen = time.monotonic()
        if not node.alive:
            node.alive = True
            self.run.event("node.returned", node_id, name=node.name, role=node.role)
        return node

    def _gone(self, node_id: str, reason: str) -> None:
        node = self.nodes.get(node_id)
        if node is None or not node.alive:
            return
        node.alive, node.departed = False, reason != "died"
        self.watch.gone(node_id, reason)
        self.control.node_left(node_id, reason)
        self._hooks.gone(node_id)
        self.run.event("node.left", node_id, name=node.name, role=node.role, reason=reason)

    # The learner

    async def _batch(self, request: Request) -> bytes:
        version = _read(request, BatchRequest).version
        loop = asyncio.get_running_loop()
        deadline = loop.time() + POLL_S
        while True:
            reply = self.control.batch(version, time.monotonic())
            if reply.episodes is not None or reply.ended or reply.save or loop.time() >= deadline:
                return encode(reply)
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await self._changed.wait()

    async def _audit(self, request: Request) -> bytes:
        asked = decode(request.body, AuditRequest, max_bytes=MAX_MANIFEST_BYTES)
        trust = self.control.trust
        self.control.checked(trust.found(asked.findings, time.monotonic()), time.monotonic())
        await self._notify()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + POLL_S
        while not (claims := trust.take()) and not self.control.ended and loop.time() < deadline:
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await self._changed.wait()
        return encode(AuditReply(claims=claims, ended=self.control.ended))

    async def _step(self, request: Request) -> bytes:
        report = decode(request.body, StepReport, max_bytes=MAX_MANIFEST_BYTES)
        if report.manifest is not None:
            signed = decode(report.manifest, SignedManifest, max_bytes=MAX_MANIFEST_BYTES)
            manifest = open_manifest(signed, self.admission.learner_key, self.run.name).manifest
            if manifest.version != report.version:
                raise RecordError(f"a report of version {report.version} carries version {manifest.version}.")
        if report.metrics:
            self.last_metrics = self.watch.metrics = dict(report.metrics)
            if self.first_step_at is None:
                self.first_step_at, self.steps_at_start = time.monotonic(), report.version
        book, queue, now = self.control.book, self.control.queue, time.monotonic()
        provisioning = self.control.provisioning
        extra: dict[str, Any] = {
            "workers": len(self.workers()),
            "swept": queue.counts["swept"],
            "void": book.counts["void"],
            "rejected": book.counts["rejected"],
            "expired": book.counts["expired"],
            "rollout_tokens_per_s": sum(n.tokens_per_s for n in self.workers()),
            **provisioning.facts(now),
            **costs(self.control, now),
            **self.control.trust.facts(),
            **{f"rate/{self.name_of(node_id)}": rate for node_id, rate in provisioning.rates().items()},
        }
        self.control.stepped(report, extra)
        if report.manifest is not None:
            provisioning.published(report.version, report.metrics.get("snapshot_bytes", 0.0), now)
            self.run.event("snapshot.published", request.sender, version=report.version)
        if report.checkpointed and self.control.drain is not None:
            self.control.drain.saved(now)
        await self._notify()
        return encode(
            StepReply(
                ended=self.control.ended,
                oldest_version=self.control.evals.oldest_version,
                publish_every=provisioning.interval if self.config.capacity.adapt_interval else 0,
            )
        )

    # Clockwork

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.control.tick(now)
            self._provision(now)
            if self.control.ended:
                self._over.set()
            await self._notify()

    def _provision(self, now: float) -> None:
        """Tell the planner who is here, and do what it asks for."""
        provisioning = self.control.provisioning
        records = {node.id: node.record for node in self.member.nodes("worker", absent=True)}
        offers = [_offer(node.node_id, records.get(node.node_id)) for node in self.workers()]
        before = provisioning.parked
        if provisioning.see(offers, now):
            for node_id in provisioning.parked - before:
                self.run.event("worker.parked", node_id, name=self.name_of(node_id))
            for node_id in before - provisioning.parked:
                self.run.event("worker.activated", node_id, name=self.name_of(node_id))
        priced = (offer.id for offer in offers if offer.price_usd_per_hour > 0)
        self._hooks.settle({node_id: node_id not in provisioning.parked for node_id in priced}, self.name_of)
        if provisioning.missing_rate > 0 and self.control.drain is None:
            rate = provisioning.pacer.rate * self.config.rollout.group_size
            self._hooks.acquire(rate, provisioning.missing_rate, now)
        for node_id in provisioning.to_release(now):
            self._hooks.release(node_id, self.name_of(node_id))

    async def _watch(self) -> None:
        async with self._fabric.watch_alive() as changes:
            async for change in changes:
                node = self.nodes.get(change.node_id)
                if not change.alive:
                    self._gone(change.node_id, "died")
                elif node is not None and not node.alive and not node.departed:
                    self._seen(change.node_id)  # its connection was lost and stands again
                await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # Views

    def name_of(self, node_id: str) -> str:
        node = self.nodes.get(node_id)
        return node.name if node is not None else node_id

    def _is_own(self, node_id: str) -> bool:
        """Whether a node joined with the ticket that the run made for its own processes: it alone admits a learner."""
        node = self.nodes.get(node_id)
        used = self.admission.invites.used_by(node.public_key) if node is not None else []
        return any("learner" in invite.roles for invite in used)

    def _device_of(self, node_id: str) -> str:
        node = self.nodes.get(node_id)
        return node.device if node is not None else ""

    def _price_of(self, node_id: str) -> float:
        known = self.member.node(node_id)
        return known.record.price_usd_per_hour if known is not None else 0.0

    def workers(self) -> list[Node]:
        """Live workers."""
        return [n for n in self.nodes.values() if n.role == "worker" and n.alive]


def _offer(node_id: str, record: NodeRecord | None) -> Offer:
    """A worker as the planner sees it: free, and so never parked, until it has said what it costs."""
    if record is None:
        return Offer(node_id, rate=0.0, price_usd_per_hour=0.0)
    return Offer(
        node_id,
        rate=0.0,
        price_usd_per_hour=record.price_usd_per_hour,
        billing=record.billing,
        uplink_bytes_per_s=record.uplink_bytes_per_s or math.inf,
        downlink_bytes_per_s=record.downlink_bytes_per_s or math.inf,
    )


def _read(request: Request, kind: type[M]) -> M:
    return decode(request.body, kind, max_bytes=2**20)
