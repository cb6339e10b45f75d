"""A server whose weights follow a run: each version that the learner publishes is fetched while answers are drawn, and
swapped in between two tokens. So what is trained is served at once, and each answer names its version.

    async with following(ticket, name, note) as run:            joined as an observer
        async with opened(run.model, …) as (api, _):
            async with run.into(api.engine):                    its first version is in; later ones follow
                await serve(api, …)

Invariants: only tensors that a manifest signed by the run's learner names, and that were verified, reach the engine; it
never goes back to an older version; trouble with the run (it ended, it cannot be reached, a source lies) leaves the
version in place, and requests don't notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from shoal.broadcast.fetch import Fetcher, Snapshot, SnapshotGone
from shoal.broadcast.publisher import announcements
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.engine.merging import merged
from shoal.engine.source import LocalModel, resolve
from shoal.errors import NetworkError, ShoalError
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import data_dir
from shoal.fabric.ticket import Ticket
from shoal.protocol.work import WorkSpec
from shoal.rollout.host import model_cache, worker_identity
from shoal.rollout.link import Part, taking_part, work_spec

log = logging.getLogger("shoal.serving")

CONNECT_S = 30.0

ASK_S = 10.0
"""Announcements may get lost, so the newest version is also asked for this often."""

FIRST_S = 120.0
"""A run that has just begun has no version for a while."""

KEYS = "servers"
"""Servers' identities in the user's data directory: one for each that runs at once."""


class Swappable(Protocol):
    """An engine that takes other weights while it draws."""

    @property
    def version(self) -> int: ...

    async def load_weights(self, version: int, tensors: Mapping[str, TensorView]) -> float: ...


class FollowedRun:
    """A run that this node has joined, and its policy's versions."""

    def __init__(
        self, fabric: Fabric, part: Part, spec: WorkSpec, model: LocalModel, store: Store, say: Callable[[str], None]
    ) -> None:
        self.spec = spec
        self.model = model
        """What the policy began as: architecture, tokenizer."""
        self._fabric, self._part, self._say = fabric, part, say
        self._learner = part.reply.learner_key
        self._fetcher = Fetcher(fabric, store, [self._learner])
        self._news = asyncio.Event()
        self._trouble = ""

    @asynccontextmanager
    async def into(self, engine: Swappable) -> AsyncIterator[None]:
        """The run's newest version in the engine, and every later one while inside.

        Raises:
            NetworkError: the run publishes none within two minutes.
            ModelError: the engine takes no other weights (`--weights int8`, a lossy rule of drafting).
        """
        await self._begin(engine)
        tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._follow(engine))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fetcher.close()

    async def _begin(self, engine: Swappable) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + FIRST_S
        while True:
            try:
                await self._put(engine, await self._newest())
                return
            except (NetworkError, SnapshotGone) as error:
                if loop.time() > give_up_at:
                    raise NetworkError(f"the run publishes no version: {error}", "Does it still run?") from error
                await asyncio.sleep(1.0)

    async def _newest(self) -> Snapshot:
        self._part.member.require(self._learner, "learner")
        try:
            return await self._fetcher.fetch()
        except RemoteError as error:
            if error.kind != "stranger":
                raise
            await self._part.member.introduce(self._learner)
            return await self._fetcher.fetch()

    async def _put(self, engine: Swappable, snapshot: Snapshot) -> None:
        tensors = await asyncio.to_thread(merged, self.model, snapshot.tensors)
        pause_s = await engine.load_weights(snapshot.version, tensors)
        self._say(f"version {snapshot.version} is served ({pause_s * 1000:.0f} ms pause)")

    async def _hear(self) -> None:
        """Wake who follows, where something is announced."""
        try:
            async with announcements(self._fabric, self._learner, "policy") as versions:
                async for _ in versions:
                    self._news.set()
        except NetworkError as error:
            log.warning("announcements cannot be heard: %s", error)

    async def _follow(self, engine: Swappable) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with the news.
                async with asyncio.timeout(ASK_S):
                    await self._news.wait()
            self._news.clear()
            try:
                snapshot = await self._newest()
                if snapshot.version > engine.version:
                    await self._put(engine, snapshot)
            except ShoalError as error:
                # The run may have ended, or be out of reach for a while, or stages take the weights only later; what
                # is served is as good as before.
                self._tell(f"no newer version: {error}")
                continue
            self._tell("")

    def _tell(self, trouble: str) -> None:
        """Say what is new about the run's trouble, once."""
        if trouble != self._trouble:
            self._say(trouble or "versions come again")
            self._trouble = trouble


@asynccontextmanager
async def following(ticket: Ticket, name: str, say: Callable[[str], None]) -> AsyncIterator[FollowedRun]:
    """Joined to the ticket's run as an observer, its model at hand.

    Args:
        name: what the run calls this node.
        say: told of every version, and of trouble.

    Raises:
        JoinRefused, NetworkError, ModelError: why it cannot be followed.
    """
    async with AsyncExitStack() as stack:
        identity = stack.enter_context(worker_identity(None, KEYS))
        fabric = await stack.enter_async_context(await Fabric.connect(identity, ticket, CONNECT_S))
        part = await stack.enter_async_context(taking_part(fabric, ticket, "observer", name))
        stack.push_async_callback(_leave, part)
        spec = work_spec(part.reply)
        model = await asyncio.to_thread(resolve, spec.model, model_cache(), say)
        # By key, which a server that is started again takes up: what a killed one left is used, or removed at its end.
        scratch = data_dir() / "snapshots" / f"{ticket.run}-served-{identity.node_id}"
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        store = Store(scratch, run=ticket.run, trusted_key=part.reply.learner_key, durable=False)
        yield FollowedRun(fabric, part, spec, model, store, say)


async def _leave(part: Part) -> None:
    with contextlib.suppress(NetworkError):
        await part.link.leave()


def ticket_in(text: str) -> Ticket:
    """The ticket that `text` is, is the file of, or that lies in the run's folder `text`.

    Raises:
        TicketError: there is none.
    """
    path = Path(text).expanduser()
    with contextlib.suppress(OSError):
        if path.is_dir():
            path /= "ticket.txt"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")[: 1 << 16]
    return Ticket.decode(text)
