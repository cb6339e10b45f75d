"""The coordinator on the fabric: who may say what, and the clockwork that nobody has to ask for.

    run/join       anyone who proves the ticket's secret          run/lease, heartbeat, submit, leave   joined nodes
    run/batch, run/step                                           the learner alone

The learner is the node whose key the coordinator itself made; no ticket makes another. Invariants: a request of a node
that has not joined is refused before it is read; a node that dies (liveliness) or says goodbye loses its leases at
once; every long poll ends within `POLL_S`; what cannot be written to the run's folder ends the run, because memory and
disk would no longer agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shoal.broadcast.chain import open_manifest
from shoal.config import Config
from shoal.coordinator.control import Control
from shoal.coordinator.rundir import RunDir
from shoal.errors import RecordError, ShoalError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.join import REASONS, check_join_request, read_join_request
from shoal.fabric.service import Handler, Request
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.node import JoinReply, RefusalCode
from shoal.protocol.snapshot import SignedManifest
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
    WorkSpec,
)

POLL_S = 5.0
"""The learner's question for a batch is answered within this, with or without one."""

TICK_S = 0.5
HEARTBEAT_S = 2.0

BEATS_PER_LEASE = 3
"""Heartbeats that a lease's time holds at least, so that losing one of them costs nothing."""

MAX_NODES = 1024
MAX_SUBMISSION_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 64 * 2**20
KEPT_NONCES = 4096

MAX_SLOTS = 2**16
"""More than any machine samples at once."""

M = TypeVar("M", bound=Record)


@dataclass
class Node:
    """A node that has joined."""

    node_id: str
    name: str
    role: str
    device: str
    joined_at: float
    alive: bool = True
    version: int = 0
    tokens_per_s: float = 0.0
    seen: float = field(default_factory=time.monotonic)


class Coordinator:
    """Serves one run.

    Args:
        learner_key: public key of the one node that may train and publish.
        secret: the ticket's join secret.
    """

    def __init__(
        self, config: Config, control: Control, run: RunDir, fabric: Fabric, *, learner_key: bytes, secret: bytes
    ) -> None:
        self.config = config
        self.control = control
        self.run = run
        self._fabric = fabric
        self._learner_key = learner_key
        self._secret = secret
        self.nodes: dict[str, Node] = {}
        control.name_of = self._name_of
        self._nonces: dict[bytes, None] = {}
        self._changed = asyncio.Condition()
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.started_at = time.monotonic()
        self.first_step_at: float | None = None
        self.steps_at_start = 0
        self.last_metrics: dict[str, float] = {}

    async def start(self) -> None:
        """Begin to answer."""
        joined, learner = self._is_joined, self._is_learner
        small, large = 64 * 2**10, MAX_SUBMISSION_BYTES

        async def serve(key: str, handler: Handler, max_bytes: int = small, **limits: Any) -> None:
            await self._fabric.serve(f"run/{key}", self._careful(handler), max_bytes=max_bytes, **limits)

        await serve("join", self._join)
        await serve("lease", self._lease, backlog=MAX_NODES, allow=joined)
        await serve("heartbeat", self._heartbeat, 2**20, backlog=MAX_NODES, allow=joined)
        await serve("submit", self._submit, large, concurrency=4, backlog=MAX_NODES, allow=joined)
        await serve("leave", self._leave, backlog=MAX_NODES, allow=joined)
        await serve("batch", self._batch, allow=learner)
        await serve("step", self._step, MAX_MANIFEST_BYTES, allow=learner)
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._watch())]

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

    def _careful(self, handler: Handler) -> Handler:
        async def handle(request: Request) -> bytes:
            try:
                return await handler(request)
            except StorageError as error:
                self.fail(error)
                raise

        return handle

    # Who may speak

    def _is_joined(self, key: bytes) -> bool:
        return node_id_of(key) in self.nodes

    def _is_learner(self, key: bytes) -> bool:
        return key == self._learner_key and self._is_joined(key)

    async def _join(self, request: Request) -> bytes:
        asked = read_join_request(request.body)
        if isinstance(asked, str):
            return _refusal(asked)
        code = check_join_request(
            asked,
            run=self.run.name,
            secret=self._secret,
            now=time.time(),
            seen_nonces=self._nonces,
            sender_key=request.sender_key,
        )
        if code is None and asked.role == "learner" and asked.public_key != self._learner_key:
            code = "role"
        if code is None and self.control.ended:
            code = "ended"
        if code is None and sum(node.alive for node in self.nodes.values()) >= MAX_NODES:
            code = "full"
        if code is not None:
            self.run.event("node.refused", request.sender, name=asked.name, code=code)
            return _refusal(code)
        self._nonces[asked.nonce] = None
        while len(self._nonces) > KEPT_NONCES:
            del self._nonces[next(iter(self._nonces))]
        node = Node(request.sender, asked.name, asked.role, asked.device, joined_at=time.time())
        known = self.nodes.get(node.node_id)
        if known is not None:
            # The same key again is the same node, restarted: what its former life held is lost.
            self.control.node_left(node.node_id, "restarted")
        self.nodes[node.node_id] = node
        self._forget_nodes()
        self.run.event("node.joined", node.node_id, name=node.name, role=node.role)
        spec = WorkSpec(
            model=self.config.model.name,
            dtype=self.config.model.dtype,
            envs={name: {"type": e.type, "settings": e.settings} for name, e in self.config.envs.items()},
            context_tokens=self.config.model.context_tokens,
            heartbeat_s=min(HEARTBEAT_S, self.config.rollout.lease_timeout_s / BEATS_PER_LEASE),
        )
        reply = JoinReply(accepted=True, node_id=node.node_id, learner_key=self._learner_key, spec=encode(spec))
        return encode(reply)

    def _forget_nodes(self) -> None:
        """Drop those that left longest ago; one that comes back introduces itself again."""
        gone = [node_id for node_id, node in self.nodes.items() if not node.alive]
        for node_id in gone[: max(0, len(self.nodes) - 2 * MAX_NODES)]:
            del self.nodes[node_id]

    # Workers

    async def _lease(self, request: Request) -> bytes:
        asked = _read(request, LeaseRequest)
        node = self._seen(request.sender)
        node.version = asked.version
        free_slots = max(0, min(asked.free_slots, MAX_SLOTS))
        return encode(self.control.lease(request.sender, free_slots, time.monotonic()))

    async def _heartbeat(self, request: Request) -> bytes:
        beat = _read(request, Heartbeat)
        node = self._seen(request.sender)
        node.version, node.tokens_per_s = beat.version, beat.tokens_per_s
        gone = self.control.heartbeat(request.sender, beat.leases, time.monotonic())
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
        node.seen, node.alive = time.monotonic(), True
        return node

    def _gone(self, node_id: str, reason: str) -> None:
        node = self.nodes.get(node_id)
        if node is None or not node.alive:
            return
        node.alive = False
        self.control.node_left(node_id, reason)
        self.run.event("node.left", node_id, name=node.name, role=node.role, reason=reason)

    # The learner

    async def _batch(self, request: Request) -> bytes:
        version = _read(request, BatchRequest).version
        loop = asyncio.get_running_loop()
        deadline = loop.time() + POLL_S
        while True:
            reply = self.control.batch(version)
            if reply.episodes is not None or reply.ended or loop.time() >= deadline:
                return encode(reply)
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await self._changed.wait()

    async def _step(self, request: Request) -> bytes:
        report = decode(request.body, StepReport, max_bytes=MAX_MANIFEST_BYTES)
        if report.manifest is not None:
            signed = decode(report.manifest, SignedManifest, max_bytes=MAX_MANIFEST_BYTES)
            manifest = open_manifest(signed, self._learner_key, self.run.name).manifest
            if manifest.version != report.version:
                raise RecordError(f"a report of version {report.version} carries version {manifest.version}.")
        if report.metrics:
            self.last_metrics = dict(report.metrics)
            if self.first_step_at is None:
                self.first_step_at, self.steps_at_start = time.monotonic(), report.version
        book, queue = self.control.book, self.control.queue
        extra: dict[str, Any] = {
            "workers": len(self.workers()),
            "swept": queue.counts["swept"],
            "void": book.counts["void"],
            "rejected": book.counts["rejected"],
            "expired": book.counts["expired"],
            "rollout_tokens_per_s": sum(n.tokens_per_s for n in self.workers()),
        }
        self.control.stepped(report, extra)
        if report.manifest is not None:
            self.run.event("snapshot.published", request.sender, version=report.version)
        await self._notify()
        return encode(StepReply(ended=self.control.ended, oldest_version=self.control.evals.oldest_version))

    # Clockwork

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.control.tick(time.monotonic())
            if self.control.ended:
                self._over.set()
            await self._notify()

    async def _watch(self) -> None:
        async with self._fabric.watch_alive() as changes:
            async for change in changes:
                if not change.alive:
                    self._gone(change.node_id, "died")
                    await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # Views

    def _name_of(self, node_id: str) -> str:
        node = self.nodes.get(node_id)
        return node.name if node is not None else node_id

    def workers(self) -> list[Node]:
        """Live workers."""
        return [n for n in self.nodes.values() if n.role == "worker" and n.alive]


def _read(request: Request, kind: type[M]) -> M:
    return decode(request.body, kind, max_bytes=2**20)


def _refusal(code: RefusalCode) -> bytes:
    return encode(JoinReply(accepted=False, code=code, reason=REASONS[code]))
