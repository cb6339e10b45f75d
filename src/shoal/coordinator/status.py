"""The coordinator's watch over its nodes: it asks each how it is, and tells who asks how the run is.

    every desk asked about once a second ──▶ NodeStatus ──┐
    heartbeats, leases, liveliness ───────────────────────┼──▶ RunStatus ──▶ live view, `run/status`
    processes that this machine runs ─────────────────────┘

A node is heard of when it answers here or speaks to the coordinator by itself. Invariants: no answer is waited for
longer than `ASK_DEADLINE_S`, at most `MAX_ASKED` are waited for at once, and `ASKS_PER_S` bounds the traffic, so that
watching a thousand nodes costs what watching fifty does; what nodes say is kept in small, and decides nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from msgspec.structs import replace

from shoal.coordinator.control import Control
from shoal.coordinator.costs import costs
from shoal.coordinator.silence import Notice, notices, state_of, stopped_process
from shoal.errors import NetworkError, RecordError
from shoal.fabric.desk import Account, Desk, ask_status
from shoal.fabric.fabric import Fabric
from shoal.fabric.service import Request
from shoal.fabric.waits import open_waits
from shoal.protocol.codec import encode
from shoal.protocol.status import (
    MAX_LEASES,
    MAX_LINKS,
    MAX_NODES,
    LeaseState,
    NodeStatus,
    NodeView,
    QueueState,
    RunStatus,
    clipped,
)

if TYPE_CHECKING:
    from shoal.coordinator.service import Node

ASK_EVERY_S = 1.0
ASKS_PER_S = 50.0
ASK_DEADLINE_S = 3.0
MAX_ASKED = 64

LOST_SHOWN_S = 600.0
"""A node that was lost stays in the list for so long."""

KEPT_WAITS = 8
KEPT_ENTRIES = 16
KEPT_TEXT_CHARS = 120
"""What is kept and passed on of each node's status; a hostile one is no larger than an honest one."""

MAX_DETAILED = 256
"""Nodes whose own words a `RunStatus` holds, those that others wait for first."""

STATUS_BYTES = 256
"""The longest question."""


@dataclass
class _Heard:
    """What was heard of one node by asking."""

    status: NodeStatus | None = None
    at: float = 0.0
    asked_at: float = 0.0


@dataclass(frozen=True)
class _Process:
    """A process that this run started on this machine."""

    pid: int
    started_at: float


class Watch:
    """Knows how every node is. Times are monotonic seconds.

    Args:
        nodes: the coordinator's, by id.
        node_id: the coordinator's own.
        allow: takes the public key of who asks for the run's status, or for the coordinator's logs and stacks.
    """

    def __init__(
        self,
        control: Control,
        nodes: Mapping[str, Node],
        fabric: Fabric,
        node_id: str,
        run: str,
        allow: Callable[[bytes], bool],
    ) -> None:
        self._control = control
        self._nodes = nodes
        self._fabric = fabric
        self._node_id = node_id
        self._run = run
        self._allow = allow
        self.price_of: Callable[[str], float] = lambda _: 0.0
        """US dollars an hour of a node, by id."""
        self.delays_of: Callable[[str], Mapping[str, float]] = lambda _: {}
        """Round trips that a node has measured, by id: node id -> seconds."""
        self._heard: dict[str, _Heard] = {}
        self._asking: set[str] = set()
        self._lost: dict[str, float] = {}
        self._processes: dict[str, _Process] = {}
        self.num_unanswered = 0
        self.desk = Desk(fabric, "coordinator", "coordinator", self._account, allow)
        self.metrics: Mapping[str, float] = {}
        """Of the last step."""

    async def run(self) -> None:
        """Serve and ask until cancelled."""
        await self._fabric.serve(
            "run/status", self._tell, max_bytes=STATUS_BYTES, concurrency=2, backlog=32, allow=self._allow
        )
        async with self.desk, asyncio.TaskGroup() as group:
            while True:
                for node in self._due(time.monotonic()):
                    self._asking.add(node.node_id)
                    group.create_task(self._ask(node))
                await asyncio.sleep(ASK_EVERY_S)

    # What the coordinator notices

    def process_started(self, name: str, pid: int) -> None:
        """A process of this run was started here; the node that it becomes will be called `name`."""
        self._processes[name] = _Process(pid, time.monotonic())

    def process_ended(self, name: str) -> None:
        """It has ended."""
        self._processes.pop(name, None)

    def gone(self, node_id: str, reason: str) -> None:
        """A node left, was sent away, or died: its connection went without a goodbye."""
        if reason == "died":
            self._lost[node_id] = time.monotonic()
        else:
            self._lost.pop(node_id, None)
            self._heard.pop(node_id, None)

    # Asking

    def _due(self, now: float) -> list[Node]:
        """Nodes to ask now, those asked longest ago first."""
        self._forget(now)
        known = [node for node in self._nodes.values() if self._is_shown(node, now)]
        every_s = max(ASK_EVERY_S, len(known) / ASKS_PER_S) * 0.9  # the clock's own jitter
        free = MAX_ASKED - len(self._asking)
        waiting = [
            node
            for node in known
            if node.node_id not in self._asking and now - self._heard_of(node).asked_at >= every_s
        ]
        return sorted(waiting, key=lambda node: self._heard_of(node).asked_at)[:free]

    def _forget(self, now: float) -> None:
        for table in (self._heard, self._lost):
            for node_id in [node_id for node_id in table if node_id not in self._nodes]:
                del table[node_id]
        for node_id in [node_id for node_id, at in self._lost.items() if now - at > LOST_SHOWN_S]:
            del self._lost[node_id]

    def _is_shown(self, node: Node, now: float) -> bool:
        return node.role != "observer" and (node.alive or node.node_id in self._lost)

    def _heard_of(self, node: Node) -> _Heard:
        return self._heard.setdefault(node.node_id, _Heard())

    async def _ask(self, node: Node) -> None:
        heard = self._heard_of(node)
        heard.asked_at = time.monotonic()
        try:
            status = await ask_status(self._fabric, node.public_key, node.node_id, ASK_DEADLINE_S)
        except (NetworkError, RecordError):
            self.num_unanswered += 1  # Its silence is what is told.
        else:
            heard.status, heard.at = _in_small(status), time.monotonic()
            if heard.asked_at > self._lost.get(node.node_id, heard.asked_at):
                # It is back: it was stopped or cut off, and its connection was made anew. Nothing else says so of a
                # learner, which does not speak while it trains.
                del self._lost[node.node_id]
                node.alive = True
        finally:
            self._asking.discard(node.node_id)

    # Telling

    async def _tell(self, _: Request) -> bytes:
        return encode(self.status())

    def status(self) -> RunStatus:
        """The run as it is now."""
        control, coordinator = self._control, self.desk.status()
        views, now = self.views(), time.monotonic()
        return RunStatus(
            run=clipped(self._run),
            step=control.version,
            steps=control.config.run.steps,
            published=control.published,
            max_staleness=control.config.learner.max_staleness,
            most_stale=control.consumption.max_staleness,
            groups=dict(control.queue.counts) | {f"rollouts_{what}": n for what, n in control.book.counts.items()},
            usd_per_hour=sum(view.price_usd_per_hour for view in views if view.state not in ("lost", "starting")),
            coordinator=coordinator,
            nodes=_detailed(views),
            silent=tuple(notice.text for notice in self._notices(views)),
            ended=control.ended,
            failure=clipped(str(control.failure or "")),
            mode=control.config.learner.mode,
            metrics={**self.metrics, **control.provisioning.facts(now), **costs(control, now)},
        )

    def notices(self) -> list[Notice]:
        """Whatever keeps others waiting."""
        return self._notices(self.views())

    def _notices(self, views: list[NodeView]) -> list[Notice]:
        names = {view.node_id: view.name for view in views if view.node_id} | {self._node_id: "coordinator"}
        return notices(views, open_waits(nested=False), names, self._remark)

    def views(self) -> list[NodeView]:
        """Every node that is here, was lost lately, or was started here and has not joined yet."""
        now = time.monotonic()
        found = [self._view(node, now) for node in self._nodes.values() if self._is_shown(node, now)][:MAX_NODES]
        last_seen = {node.name: node.seen for node in self._nodes.values()}
        for name, process in self._processes.items():
            if last_seen.get(name, 0.0) < process.started_at:
                role = "learner" if name == "learner" else "worker"
                age_s = now - process.started_at
                found.append(NodeView(node_id="", name=name, role=role, state="starting", silent_s=age_s))
        return found

    def _view(self, node: Node, now: float) -> NodeView:
        heard = self._heard_of(node)
        held = [h for h in self._control.book.running.values() if h.node_id == node.node_id]
        lost_at = self._lost.get(node.node_id)
        silent_s = max(0.0, now - max(heard.at, node.seen))
        state, why = state_of(
            silent_s=silent_s,
            connected=lost_at is None,
            has_work=bool(held) or node.role != "worker",
            idle=self._control.why_idle(node.node_id, now),
        )
        own = heard.status
        age_s = now - heard.at if own is not None else 0.0
        return NodeView(
            node_id=node.node_id,
            name=clipped(node.name),
            role=node.role,
            state=state,
            why=why,
            public_key=node.public_key,
            device=clipped(node.device),
            silent_s=silent_s,
            version=own.version if own is not None else node.version,
            tokens_per_s=node.tokens_per_s if state != "lost" else 0.0,
            price_usd_per_hour=self.price_of(node.node_id),
            leases=tuple(
                LeaseState(
                    id=clipped(h.lease_id), rollouts=h.rollouts, tokens=h.progress, left_s=max(0.0, h.deadline - now)
                )
                for h in held[:MAX_LEASES]
            ),
            num_leases=len(held),
            delays=dict(islice(self.delays_of(node.node_id).items(), MAX_LINKS)),
            status=None if own is None else _aged(own, age_s),
            status_age_s=age_s,
        )

    def _remark(self, view: NodeView) -> str:
        """Of a process of this machine that was stopped."""
        process = self._processes.get(view.name)
        same = process is not None and (view.status is None or view.status.pid == process.pid)
        return stopped_process(process.pid) if process is not None and same else ""

    def _account(self) -> Account:
        control = self._control
        leases = "\n".join(
            f"{h.lease_id} {control.name_of(h.node_id)}: {h.rollouts} rollouts, {h.progress} tokens, "
            f"expires in {h.deadline - time.monotonic():.0f} s"
            for h in control.book.running.values()
        )
        return Account(
            doing="ends the run" if control.ended else "leads the run",
            version=control.version,
            queues=(
                QueueState(name="groups pending", length=len(control.queue.pending), bound=0),
                QueueState(name="groups running", length=len(control.queue.running), bound=0),
                QueueState(name="groups buffered", length=len(control.queue.buffered), bound=0),
            ),
            counters={**control.queue.counts, **control.book.counts, "status.unanswered": self.num_unanswered},
            details={"leases": leases or "none"},
        )


def _detailed(views: list[NodeView]) -> tuple[NodeView, ...]:
    """With the own words of so many nodes as fit."""
    if len(views) <= MAX_DETAILED:
        return tuple(views)
    order = sorted(views, key=lambda view: (view.state in ("active", "idle"), view.role != "learner"))
    kept = {view.node_id for view in order[:MAX_DETAILED]}
    return tuple(view if view.node_id in kept else replace(view, status=None) for view in views)


def _in_small(status: NodeStatus) -> NodeStatus:
    """What is worth keeping of a node's own words."""

    def short(text: str) -> str:
        return clipped(text, KEPT_TEXT_CHARS)

    return replace(
        status,
        name=short(status.name),
        software=short(status.software),
        host=short(status.host),
        doing=short(status.doing),
        device=short(status.device),
        waits=tuple(
            replace(wait, what=short(wait.what), whom=short(wait.whom), until=short(wait.until))
            for wait in status.waits[:KEPT_WAITS]
        ),
        queues=tuple(replace(queue, name=short(queue.name)) for queue in status.queues[:KEPT_ENTRIES]),
        rates={short(name): rate for name, rate in list(status.rates.items())[:KEPT_ENTRIES]},
        counters={short(name): count for name, count in list(status.counters.items())[:KEPT_ENTRIES]},
    )


def _aged(status: NodeStatus, age_s: float) -> NodeStatus:
    """Its waits go on while nobody asks."""
    return replace(status, waits=tuple(replace(wait, seconds=wait.seconds + age_s) for wait in status.waits))
