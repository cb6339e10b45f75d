"""A run inside the test's own process: coordinator, a hand that publishes in the learner's place, real workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.broadcast.publisher import Publisher, write_snapshot
from shoal.broadcast.store import Store
from shoal.config import config_from
from shoal.coordinator.admission import Admission
from shoal.coordinator.control import Control
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.service import Coordinator
from shoal.coordinator.tasks import make_environments
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.join import invitation_of
from shoal.protocol.codec import encode
from shoal.protocol.roster import SwarmRole
from shoal.protocol.work import BatchReply, BatchRequest, StepReply, StepReport
from shoal.rollout.host import WorkerOptions, working
from shoal.rollout.link import taking_part
from shoal.rollout.worker import Worker
from tiny import tiny_config, tiny_model

__all__ = ["tiny_model"]

SECRET = b"s" * 16


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[LocalEngine]:
    """The tiny model's engine."""
    async with LocalEngine(
        LocalModel("tiny", tiny_model),
        dtype="fp32",
        device="cpu",
        max_sequences=8,
        cache_tokens=1024,
        context_tokens=64,
    ) as made:
        yield made


class TestRun:
    """A run whose learner is the test."""

    __test__ = False

    def __init__(self, path: Path, model: Path, **changes: Any) -> None:
        self.model = model
        self.config = config_from(tiny_config(model, path.parent, **changes))
        self.run = RunDir.create(path)
        self.learner = Identity.load_or_create(path / "identity" / "learner")
        self.identity = Identity.load_or_create(path / "identity" / "coordinator")
        self.coordinator: Coordinator
        self.fabric: Fabric
        self.port = 0
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Coordinator and the learner's connection; again after `stop`, at the same port."""
        self.control = Control(self.config, make_environments(self.config), self.run)
        self.fabric = await self._stack.enter_async_context(await Fabric.listen(self.identity, port=self.port))
        self.port = int(self.fabric.endpoints[0].rpartition(":")[2])
        self.admission = Admission.of(self.run)
        if self.admission.invites.find(invitation_of(SECRET)) is None:
            roles: tuple[SwarmRole, ...] = ("learner", "worker", "observer")
            self.admission.invites.issue(roles, time.time(), life_s=3600.0, max_uses=64, secret=SECRET)
        self.coordinator = Coordinator(self.config, self.control, self.run, self.fabric, self.admission)
        await self.coordinator.start()
        self._stack.push_async_callback(self.coordinator.close)
        self.ticket = self.fabric.ticket(self.run.name, SECRET)
        self.learner_fabric = await self._stack.enter_async_context(await Fabric.connect(self.learner, self.ticket))
        part = await self._stack.enter_async_context(
            taking_part(self.learner_fabric, self.ticket, "learner", "learner")
        )
        self.link, self.member = part.link, part.member
        self.store = Store(self.run.path / "snapshots", run=self.run.name, trusted_key=self.learner.public_key)
        self.publisher = Publisher(self.learner_fabric, self.store, allow=self.member.is_granted)
        await self.publisher.start()

    async def stop(self) -> None:
        """As a killed coordinator: nobody is told anything."""
        await self._stack.aclose()
        self._stack = AsyncExitStack()
        self.run.close()

    async def publish(self, version: int, **report: Any) -> None:
        """Publish the model's own weights as `version`."""
        tensors = to_views(LocalModel("tiny", self.model).tensors())
        published = write_snapshot(self.store, self.learner, "policy", version, tensors)
        metrics = {"reward": 0.0} if version else {}
        await self.link.call(
            "step",
            StepReport(version=version, metrics=metrics, manifest=encode(published.signed), **report),
            StepReply,
        )
        await self.publisher.announce("policy", version)

    async def batch(self, version: int) -> BatchReply:
        """Wait for the batch of a step."""
        async with asyncio.timeout(30):
            while True:
                reply = await self.link.call("batch", BatchRequest(version=version), BatchReply, 20.0)
                if reply.episodes is not None or reply.ended:
                    return reply

    @asynccontextmanager
    async def worker(self, name: str, **options: Any) -> AsyncIterator[Worker]:
        """A worker that has joined; `run` it."""
        defaults = {"device": "cpu", "max_sequences": 16, "cache_tokens": 2048}
        identity = Identity.generate()
        async with (
            await Fabric.connect(identity, self.ticket) as fabric,
            working(fabric, self.ticket, WorkerOptions(name=name, **{**defaults, **options})) as worker,
        ):
            yield worker


@pytest.fixture
async def make_run(tmp_path: Path, tiny_model: Path, shoal_home: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes and starts a run; `changes` as in `tiny_config`."""
    made: list[TestRun] = []

    async def make(**changes: Any) -> TestRun:
        run = TestRun(
            tmp_path / "runs" / f"run-{len(made)}",
            tiny_model,
            **{"eval__before": False, "eval__after": False, **changes},
        )
        made.append(run)
        await run.start()
        return run

    yield make
    for run in made:
        await run.stop()
