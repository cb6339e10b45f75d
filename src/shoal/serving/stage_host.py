"""What `shoal worker --stage` does: joins a server's pipeline by its ticket, and computes the layers it is given.

    ticket ──▶ join ──▶ the model's config ──▶ measure a layer ──▶ home link ──▶ offer ──▶ assignments, steps

Invariants: only the server that the ticket pins assigns layers, and weights come from it or, where the caller says so,
from this disk; a home link that ends is dialled again for `PATIENCE_S`, then the stage gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.engine.local import pick_device
from shoal.engine.pipeline.links import link_delay
from shoal.engine.pipeline.node import StageNode
from shoal.engine.pipeline.stage import layer_bytes, layer_seconds
from shoal.engine.pipeline.weights import chosen, config_of, fetch
from shoal.engine.pipeline.wire import TYPES
from shoal.engine.source import LocalModel
from shoal.errors import NetworkError, RecordError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import node_id_of
from shoal.fabric.service import Request
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import Record, decode, encode
from shoal.protocol.stage import (
    MAX_LAYERS,
    MAX_TENSOR_PIECE_BYTES,
    Assignment,
    DelayReply,
    DelayRequest,
    PrepareRequest,
    StageOffer,
    StageSpec,
    TensorPiece,
    TensorRequest,
)
from shoal.protocol.work import Ack
from shoal.rollout.link import Part, taking_part
from shoal.swarm.gossip import swarm_prefix
from shoal.swarm.measure import measure_delay

log = logging.getLogger("shoal.pipeline")

MEMORY_SHARE = 0.8
"""Of the memory that is free, when nothing is said about it."""

PATIENCE_S = 30.0
RETRY_S = 1.0
ASK_S = 30.0
TENSOR_S = 60.0
SMALL_BYTES = 64 * 2**10
REQUESTS_AT_ONCE = 4


@dataclass(frozen=True)
class StageOptions:
    """What the machine's owner decides."""

    name: str = ""
    threads: int = 1
    device: str = "auto"
    host: str = "127.0.0.1"
    """Address on which the stage before takes a direct link; where it can't, steps go by the server."""
    max_layers: int = 0
    """0: as many as fit the memory that is free."""
    local_model: Path | None = None
    """The checkpoint, where it is on this disk."""


async def serve_stage(
    fabric: Fabric, ticket: Ticket, options: StageOptions, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Take part until cancelled or until the server is gone.

    Raises:
        JoinRefused, NetworkError, ModelError: why it can't, or no longer.
    """
    device = pick_device(options.device)
    name = options.name or f"{platform.node()}:{os.getpid()}"
    async with taking_part(fabric, ticket, "stage", name, device=str(device), threads=options.threads) as part:
        spec = decode(part.reply.spec, StageSpec, max_bytes=2 * 2**20)
        host = _Host(fabric, ticket, options, part, spec, progress)
        async with Desk(fabric, name, "stage", host.account, part.member.is_granted, device=str(device)):
            try:
                await host.run(device)
            finally:
                await host.close()
                with contextlib.suppress(NetworkError):
                    await part.link.leave()


class _Host:
    """One stage's dealings with its server."""

    def __init__(
        self,
        fabric: Fabric,
        ticket: Ticket,
        options: StageOptions,
        part: Part,
        spec: StageSpec,
        progress: Callable[[str], None],
    ) -> None:
        self._fabric, self._ticket, self._options = fabric, ticket, options
        self._part, self._spec, self._progress = part, spec, progress
        self._node: StageNode | None = None
        self._linked_at = time.monotonic()
        """When there was a link last."""

    def account(self) -> Account:
        node = self._node
        if node is None or node.assignment is None:
            return Account(doing="waits for layers" if node else "measures a layer")
        mine = node.assignment
        doing = f"computes layers {mine.first} to {mine.last - 1}"
        return Account(doing=doing, counters={"steps": node.num_steps, "busy_ms": int(1000 * node.busy_s)})

    async def run(self, device: Any) -> None:
        """Serve, over as many home links as it takes."""
        config = await asyncio.to_thread(config_of, self._spec.config)
        dtype = TYPES[self._spec.dtype]
        seconds = await asyncio.to_thread(layer_seconds, config, dtype, device)
        room = self._options.max_layers
        if not room:
            each = await asyncio.to_thread(layer_bytes, config, dtype, self._spec.cache_tokens)
            room = int(MEMORY_SHARE * free_bytes() // each)
        self._node = node = StageNode(
            self._fabric.identity,
            config,
            dtype,
            device,
            threads=self._options.threads,
            tensors=self._tensors,
            allow=self._may_link,
        )
        address = await node.listen(self._options.host)
        for verb, handler in (("assign", self._assign), ("delays", self._delays), ("prepare", self._prepare)):
            await self._fabric.serve(
                f"node/{self._fabric.identity.node_id}/{verb}",
                handler,
                max_bytes=SMALL_BYTES,
                concurrency=REQUESTS_AT_ONCE,
                allow=lambda key: key == self._ticket.coordinator_key,
            )
        root = self._ticket.coordinator_key
        delay_s = await measure_delay(self._fabric, swarm_prefix(self._ticket.run), root, node_id_of(root)) / 2
        offer = StageOffer(
            address=address, max_layers=max(1, min(room, MAX_LAYERS)), seconds_per_layer=seconds, delay_s=delay_s
        )
        told_at = -1.0
        while True:
            try:
                await self._serve(node, offer)
            except (NetworkError, RecordError) as error:
                if time.monotonic() > self._linked_at + PATIENCE_S:
                    raise
                if told_at != self._linked_at:  # once an outage
                    log.warning("the link to the server is dialled again: %s", error.problem)
                    told_at = self._linked_at
            await asyncio.sleep(RETRY_S)

    async def _serve(self, node: StageNode, offer: StageOffer) -> None:
        """One home link's life.

        Raises:
            NetworkError, RecordError: why it ended, or never began.
        """
        serving = asyncio.create_task(node.run(self._spec.home))
        offering = asyncio.create_task(self._ask("pipeline/offer", offer))
        try:
            await asyncio.wait({serving, offering}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                offering.result()
                self._progress("joined; waits for layers")
                await asyncio.wait({serving})
                self._linked_at = time.monotonic()
            serving.result()
        finally:
            for task in (serving, offering):
                task.cancel()
            await asyncio.gather(serving, offering, return_exceptions=True)

    def _may_link(self, key: bytes) -> bool:
        return "stage" in self._part.member.grants.roles(key, time.time())

    async def close(self) -> None:
        if self._node is not None:
            await self._node.close()

    async def _assign(self, request: Request) -> bytes:
        assignment = decode(request.body, Assignment, max_bytes=SMALL_BYTES)
        if self._node is None:
            raise RecordError("this stage has not begun.")
        done = await self._node.assign(assignment)
        self._progress(
            f"layers {assignment.first} to {assignment.last - 1} "
            f"(stage {assignment.stage + 1} of {assignment.num_stages}; ready in {done.seconds:.1f} s)"
        )
        return encode(done)

    async def _prepare(self, request: Request) -> bytes:
        asked = decode(request.body, PrepareRequest, max_bytes=SMALL_BYTES)
        if self._node is not None:
            await self._node.prepare(asked.version)
        return encode(Ack())

    async def _delays(self, request: Request) -> bytes:
        asked = decode(request.body, DelayRequest, max_bytes=SMALL_BYTES)
        return encode(DelayReply(delays_s=tuple([await link_delay(address) for address in asked.addresses])))

    async def _tensors(self, shapes: Mapping[str, tuple[int, ...]], version: int) -> Mapping[str, Any]:
        if self._options.local_model is not None and version == 0:
            model = LocalModel(self._spec.model, self._options.local_model)
            return await asyncio.to_thread(chosen, model, shapes)

        async def ask(request: TensorRequest) -> TensorPiece:
            limit = MAX_TENSOR_PIECE_BYTES + SMALL_BYTES
            data = await self._ask("pipeline/tensor", request, TENSOR_S, limit)
            return decode(data, TensorPiece, max_bytes=limit)

        with self._part.member.transferring():
            return await fetch(ask, shapes, version)

    async def _ask(self, key: str, message: Record, deadline_s: float = ASK_S, limit: int = SMALL_BYTES) -> bytes:
        return await self._fabric.request(
            key, encode(message), deadline_s, to=self._ticket.coordinator_key, max_reply_bytes=limit
        )


def free_bytes() -> int:
    """Memory that this machine could give to a process now."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
