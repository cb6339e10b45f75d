"""A node's desk: where it answers how it is, what it logged, and where it hangs.

    node/ID/status ──▶ NodeStatus      node/ID/logs ──▶ LogReply      node/ID/dump ──▶ Dump

Every node of a run keeps one open, the coordinator too. Invariants: only those whom `allow` admits are answered;
answering needs nothing but the loop, so that a node that answers nothing is stopped, cut off, or has a loop that does
not turn, which is what its silence then says; no answer holds a ticket or a key.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import shoal
from shoal.errors import RecordError
from shoal.fabric import dump
from shoal.fabric.fabric import Fabric
from shoal.fabric.log_ring import log_ring
from shoal.fabric.service import Request, Service
from shoal.fabric.waits import open_waits
from shoal.protocol.codec import decode, encode
from shoal.protocol.status import (
    MAX_DUMP_BYTES,
    MAX_ENTRIES,
    MAX_LOGS_BYTES,
    MAX_STATUS_BYTES,
    MAX_WAITS,
    Dump,
    LogReply,
    LogRequest,
    NodeStatus,
    QueueState,
    clipped,
)

QUESTION_BYTES = 256
"""The longest question that a desk takes."""

DUMPS_AT_ONCE = 2
"""Each walks over every stack."""


@dataclass(frozen=True)
class Account:
    """What a node knows about itself beyond its process."""

    doing: str
    version: int = -1
    queues: tuple[QueueState, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    """For a dump alone: title -> text, a few of them."""


class Desk:
    """Answers for one node while inside: `async with Desk(fabric, "local-0", "worker", account, allow): …`.

    Args:
        account: what the node says of itself now; quick, and called on the loop.
        allow: takes the public key of who asks.
    """

    def __init__(
        self,
        fabric: Fabric,
        name: str,
        role: str,
        account: Callable[[], Account],
        allow: Callable[[bytes], bool],
        *,
        device: str = "",
    ) -> None:
        self._fabric = fabric
        self._name = clipped(name)
        self._role = role
        self._account = account
        self._allow = allow
        self._device = clipped(device)
        self._born = time.monotonic()
        self._services: list[Service] = []
        self._ring = log_ring()

    async def open(self) -> None:
        """Begin to answer."""
        serve, at = self._fabric.serve, desk_key(self._fabric.identity.node_id)
        small, allow = QUESTION_BYTES, self._allow
        self._services = [
            await serve(f"{at}/status", self._tell, max_bytes=small, concurrency=4, backlog=16, allow=allow),
            await serve(f"{at}/logs", self._read, max_bytes=small, concurrency=2, backlog=8, allow=allow),
            await serve(f"{at}/dump", self._dump, max_bytes=small, concurrency=DUMPS_AT_ONCE, backlog=2, allow=allow),
        ]

    async def close(self) -> None:
        """Stop answering."""
        services, self._services = self._services, []
        for service in services:
            await service.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def status(self) -> NodeStatus:
        """What a question for the status gets."""
        account = self._account()
        waits = open_waits(nested=False)
        counters = Counter(account.counters)
        counters.update(self._fabric.counters)
        return NodeStatus(
            node_id=self._fabric.identity.node_id,
            name=self._name,
            role=self._role,
            software=shoal.__version__,
            protocol_version=shoal.PROTOCOL_VERSION,
            pid=os.getpid(),
            host=clipped(platform.node()),
            now=time.time(),
            up_s=time.monotonic() - self._born,
            doing=clipped(account.doing),
            version=account.version,
            device=self._device,
            waits=tuple(waits[:MAX_WAITS]),
            num_waits=len(waits),
            queues=account.queues[:MAX_ENTRIES],
            rates=dict(list(account.rates.items())[:MAX_ENTRIES]),
            counters=dict(counters.most_common(MAX_ENTRIES)),
            memory_bytes=dump.resident_bytes(),
        )

    def dump(self) -> Dump:
        """What a question for a dump gets."""
        account = self._account()
        counters = Counter(account.counters)
        counters.update(self._fabric.counters)
        own = {
            "state": "\n".join(
                [
                    f"{self._role} {self._name}: {account.doing}",
                    *(f"queue {q.name}: {q.length}{f' of {q.bound}' if q.bound else ''}" for q in account.queues),
                    *(f"{name}: {rate:.1f}/s" for name, rate in account.rates.items()),
                ]
            ),
            "counters": "\n".join(f"{name}: {count}" for name, count in sorted(counters.items())) or "none",
            **account.details,
        }
        return Dump(
            node_id=self._fabric.identity.node_id,
            name=self._name,
            role=self._role,
            taken_at=time.time(),
            sections=dump.sections(own),
        )

    async def _tell(self, request: Request) -> bytes:
        _no_words(request)
        return encode(self.status())

    async def _read(self, request: Request) -> bytes:
        return encode(self._ring.read(decode(request.body, LogRequest, max_bytes=QUESTION_BYTES)))

    async def _dump(self, request: Request) -> bytes:
        _no_words(request)
        return encode(self.dump())


def desk_key(node_id: str) -> str:
    """Where the node with this id has its desk."""
    return f"node/{node_id}"


async def ask_status(fabric: Fabric, key: bytes, node_id: str, deadline_s: float) -> NodeStatus:
    """How the node is.

    Raises:
        NetworkError: it does not answer, or admits only others.
        RecordError: its answer is none.
    """
    data = await _ask(fabric, key, f"{desk_key(node_id)}/status", b"", deadline_s, MAX_STATUS_BYTES)
    status = decode(data, NodeStatus, max_bytes=MAX_STATUS_BYTES)
    if status.node_id != node_id:
        raise RecordError(f"node {node_id} answers as node {status.node_id}.")
    return status


async def ask_logs(fabric: Fabric, key: bytes, node_id: str, request: LogRequest, deadline_s: float) -> LogReply:
    """Log lines of a node; raises as `ask_status`."""
    data = await _ask(fabric, key, f"{desk_key(node_id)}/logs", encode(request), deadline_s, MAX_LOGS_BYTES)
    return decode(data, LogReply, max_bytes=MAX_LOGS_BYTES)


async def ask_dump(fabric: Fabric, key: bytes, node_id: str, deadline_s: float) -> Dump:
    """What a node does at this moment; raises as `ask_status`."""
    data = await _ask(fabric, key, f"{desk_key(node_id)}/dump", b"", deadline_s, MAX_DUMP_BYTES)
    return decode(data, Dump, max_bytes=MAX_DUMP_BYTES)


async def _ask(fabric: Fabric, key: bytes, path: str, body: bytes, deadline_s: float, limit: int) -> bytes:
    return await fabric.request(path, body, deadline_s, to=key, max_reply_bytes=limit)


def _no_words(request: Request) -> None:
    if request.body:
        raise RecordError("a question for a status or a dump needs no words.")
