"""A coordinator that serves on loopback, and nodes that join it: real ones, but for an engine to act with."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from shoal.config import config_from
from shoal.coordinator.admission import GRANT_LIFE_S, Admission
from shoal.coordinator.control import Control
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.service import Coordinator
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.protocol.codec import read_jsonl
from shoal.protocol.event import Event
from shoal.protocol.roster import SwarmRole
from shoal.protocol.work import Lease, StepReport
from shoal.rollout.link import Part, taking_part
from tiny import FirstDigit, tiny_config


class Served:
    """`async with Served(path) as run: …`: the coordinator, with version 0 published, and what joins it."""

    def __init__(self, path: Path, *, grant_life_s: float = GRANT_LIFE_S, **changes: Any) -> None:
        changes = {"eval__before": False, "eval__after": False, "run__steps": 1000} | changes
        self.config = config_from(tiny_config(path / "model", path / "runs", **changes))
        self.run = RunDir.create(path / "runs" / "a run")
        self.learner = Identity.load_or_create(self.run.path / "identity" / "learner")
        self.root = Identity.load_or_create(self.run.path / "identity" / "coordinator")
        self.grant_life_s = grant_life_s
        self.admission: Admission
        self.control: Control
        self.coordinator: Coordinator
        self.fabric: Fabric
        self._port = 0
        self._has_learner = True
        self._stack = AsyncExitStack()
        self._nodes = AsyncExitStack()

    async def __aenter__(self) -> Served:
        self.admission = Admission(self.run, self.root, self.learner.public_key, grant_life_s=self.grant_life_s)
        self.control = Control(self.config, {"digit": FirstDigit(name="digit")}, self.run, vocab_size=82)
        self.fabric = await self._stack.enter_async_context(await Fabric.listen(self.root, port=self._port))
        self._port = int(self.fabric.endpoints[0].rpartition(":")[2])
        self.coordinator = Coordinator(self.config, self.control, self.run, self.fabric, self.admission)
        await self.coordinator.start()
        self._stack.push_async_callback(self.coordinator.close)
        if self._has_learner:
            self.control.stepped(StepReport(version=0, metrics={}, manifest=b"signed"), {})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._nodes.aclose()
        await self._stack.aclose()
        self.run.close()

    async def restart(self, *, learner: bool = True) -> None:
        """As a killed coordinator that comes back, with or without its learner; nodes stay as they are."""
        self._has_learner = learner
        await self._stack.aclose()
        self._stack = AsyncExitStack()
        self.run.close()
        await self.__aenter__()

    def ticket(self, *roles: SwarmRole, uses: int = 1, life_s: float = 3600.0) -> Ticket:
        """A ticket of its own, by default for one worker."""
        invite = self.admission.invite(roles or ("worker",), time.time(), life_s=life_s, uses=uses)
        return self.fabric.ticket(self.run.name, invite.secret)

    async def connect(self, node: Identity) -> Fabric:
        """A connection, which needs no admission."""
        return await self._nodes.enter_async_context(
            await Fabric.connect(node, self.fabric.ticket(self.run.name, b"no secret of it"))
        )

    async def join(
        self, role: SwarmRole = "worker", node: Identity | None = None, ticket: Ticket | None = None, name: str = ""
    ) -> Part:
        """A node that has joined, with a ticket of its own unless one is given."""
        node = node or (self.learner if role == "learner" else Identity.generate())
        fabric = await self.connect(node)
        part = taking_part(fabric, ticket or self.ticket(role), role, name or role)
        return await self._nodes.enter_async_context(part)

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_jsonl(self.run.path / "events.jsonl", Event) if event.kind == kind]

    async def lease(self, part: Part) -> Lease:
        """A lease of this node, which an honest one always gets."""
        reply = await part.link.lease(0, 8)
        assert reply.lease is not None
        return reply.lease
