"""The coordinator's watch over real nodes of a real fabric: whom it asks, what it tells, to whom, and at what cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from made import config, new_control, report

from shoal.coordinator import silence, status
from shoal.coordinator.control import Control
from shoal.coordinator.service import Node
from shoal.coordinator.status import Watch
from shoal.errors import NetworkError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.fabric.waits import waiting
from shoal.protocol.codec import decode, encode
from shoal.protocol.status import MAX_RUN_STATUS_BYTES, MAX_TEXT_CHARS, RunStatus

SECRET = b"0123456789abcdef"


class Watched:
    """A coordinator's fabric, control and watch, and nodes that come and go."""

    def __init__(self, control: Control, fabric: Fabric) -> None:
        self.control = control
        self.fabric = fabric
        self.allowed = {fabric.identity.public_key}
        self.nodes: dict[str, Node] = {}
        self.watch = Watch(
            control, self.nodes, fabric, fabric.identity.node_id, "a run", lambda key: key in self.allowed
        )

    @asynccontextmanager
    async def node(self, name: str, role: str = "worker", **account: Any) -> AsyncIterator[Fabric]:
        """A node that has joined and keeps a desk."""
        async with await Fabric.connect(Identity.generate(), self.fabric.ticket("a run", SECRET)) as fabric:
            told = Account(**{"doing": "samples", "version": 3, **account})
            root = self.fabric.identity.public_key
            async with Desk(fabric, name, role, lambda: told, lambda key: key == root):
                self.join(fabric.identity, name, role)
                yield fabric

    def join(self, identity: Identity, name: str, role: str = "worker") -> Node:
        node = Node(identity.node_id, identity.public_key, name, role, "cpu", joined_at=0.0)  # type: ignore[arg-type]
        self.nodes[node.node_id] = node
        return node


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(status, "ASK_EVERY_S", 0.1)
    control = new_control(config(tmp_path), tmp_path / "a run")
    async with await Fabric.listen(Identity.generate()) as fabric:
        made = Watched(control, fabric)
        task = asyncio.create_task(made.watch.run())
        yield made
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], Any]) -> Any:
    for _ in range(1200):
        if found := holds():
            return found
        await asyncio.sleep(0.05)
    pytest.fail("what was waited for did not happen")


async def test_nodes_are_asked_and_told_of_to_those_who_may_know(watched: Watched) -> None:
    watched.control.stepped(report(0, metrics=False), {})
    async with watched.node("attic", rates={"tokens": 5.0}) as attic, watched.node("learner", "learner"):
        watched.watch.price_of = lambda node_id: 0.25 if node_id == attic.identity.node_id else 0.0
        lease = watched.control.lease(attic.identity.node_id, 8, time.monotonic()).lease
        assert lease is not None
        await until(lambda: all(view.status is not None for view in watched.watch.views()))
        reader = await Fabric.connect(Identity.generate(), watched.fabric.ticket("a run", SECRET))
        async with reader:
            with pytest.raises(NetworkError, match="has not been admitted"):
                await reader.request("run/status", b"", 10.0, to=watched.fabric.identity.public_key)
            watched.allowed.add(reader.identity.public_key)
            data = await reader.request("run/status", b"", 10.0, to=watched.fabric.identity.public_key)
        told = decode(data, RunStatus, max_bytes=MAX_RUN_STATUS_BYTES)
    views = {view.name: view for view in told.nodes}
    assert set(views) == {"attic", "learner"} and told.usd_per_hour == 0.25
    worker = views["attic"]
    assert worker.state == "active" and worker.version == 3 and worker.status is not None
    assert worker.status.doing == "samples" and worker.status.rates == {"tokens": 5.0}
    assert [(held.id, held.rollouts) for held in worker.leases] == [(lease.id, 8)] and worker.leases[0].left_s > 0
    assert told.coordinator.role == "coordinator" and told.silent == ()


async def test_a_node_that_falls_silent_is_named_and_forgotten_when_it_speaks(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENT_AFTER_S", 0.5)
    async with watched.node("attic") as attic:
        await until(lambda: all(view.status is not None for view in watched.watch.views()))
        watched.nodes[attic.identity.node_id].seen = 0.0
        services = [attic._services[key] for key in attic._services if key.endswith("/status")]
        await services[0].close()
        (notice,) = await until(watched.watch.notices)
        assert notice.text.startswith("attic silent for ") and notice.text.endswith("said last that it samples")
        watched.nodes[attic.identity.node_id].seen = time.monotonic() + 60
        assert watched.watch.notices() == [], "it spoke by itself"
        watched.nodes[attic.identity.node_id].alive = False
        watched.watch.gone(attic.identity.node_id, "died")
        assert watched.watch.views()[0].state == "lost"
        watched.watch.gone(attic.identity.node_id, "left")
        assert watched.watch.views() == []


async def test_a_learner_whose_connection_broke_is_back_when_it_answers(watched: Watched) -> None:
    """It does not speak by itself while it trains."""
    async with watched.node("learner", "learner") as fabric:
        node = watched.nodes[fabric.identity.node_id]
        await until(lambda: watched.watch.views()[0].status)
        node.alive = False
        watched.watch.gone(node.node_id, "died")
        assert watched.watch.views()[0].state == "lost"
        await until(lambda: watched.watch.views()[0].state == "active")
        assert node.alive


async def test_what_a_node_waits_for_is_told_with_names(watched: Watched) -> None:
    async with watched.node("attic"), watched.node("learner", "learner") as learner:
        with waiting("chunk 3 of version 7", whom=learner.identity.public_key, deadline_s=30.0, usual_s=0.0):
            found = await until(
                lambda: [n.text for n in watched.watch.notices() if n.subject == "attic waits for chunk 3 of version 7"]
            )
        assert found[0].startswith("attic waits for chunk 3 of version 7 from learner, ")
        assert found[0].endswith("deadline 30 s")
        await until(lambda: not watched.watch.notices())


async def test_a_hostile_node_is_no_larger_than_an_honest_one(watched: Watched) -> None:
    long = "x" * MAX_TEXT_CHARS
    counters = {f"{long[:500]}{number}": number for number in range(100)}
    async with watched.node("liar", doing=long, counters=counters):
        view = await until(lambda: next((v for v in watched.watch.views() if v.status is not None), None))
        assert len(encode(view)) < 8000
    async with await Fabric.connect(Identity.generate(), watched.fabric.ticket("a run", SECRET)) as fabric:

        async def nonsense(_: Request) -> bytes:
            return b"\xc1" * 1000

        await fabric.serve(f"node/{fabric.identity.node_id}/status", nonsense)
        watched.join(fabric.identity, "babbler")
        before = watched.watch.num_unanswered
        await until(lambda: watched.watch.num_unanswered > before + 2)


async def test_asking_is_bounded_however_many_nodes_there_are(watched: Watched) -> None:
    for _ in range(300):
        watched.join(Identity.generate(), "ghost")
    asked = await until(lambda: watched.watch._asking)
    assert len(asked) <= status.MAX_ASKED
    told = watched.watch.status()
    assert len(told.nodes) == 300 and len(told.silent) <= 256
    assert sum(view.status is not None for view in told.nodes) <= status.MAX_DETAILED


async def test_a_process_that_has_not_joined_is_told_of(watched: Watched) -> None:
    watched.watch.process_started("local-0", 2**22 + 1)
    (view,) = watched.watch.views()
    assert (view.name, view.role, view.state) == ("local-0", "worker", "starting")
    async with watched.node("local-0"):
        assert [view.state for view in watched.watch.views()] != ["starting"]
    watched.nodes.clear()
    watched.watch.process_ended("local-0")
    assert watched.watch.views() == []
