"""Everything a worker needs, put together from a ticket: connection, model, environments, snapshots.

`working(...)` opens all of it, joins the run and gives the `Worker`; leaving the context closes it. The command
`shoal worker` and the learner's colocated mode both come through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.broadcast.fetch import Fetcher
from shoal.broadcast.publisher import announcements
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.engine.local import LocalEngine
from shoal.engine.source import Progress, resolve
from shoal.envs.registry import make
from shoal.errors import NetworkError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, data_dir
from shoal.fabric.ticket import Ticket
from shoal.protocol.node import NodeRole
from shoal.rollout.link import RunLink, join, work_spec
from shoal.rollout.worker import Worker

log = logging.getLogger("shoal.rollout")

MAX_WORKERS_PER_MACHINE = 256
"""Identities tried before a machine is taken to be full."""

MODEL_CACHE = "models"


@dataclass(frozen=True)
class WorkerOptions:
    """What the machine's owner decides about a worker."""

    name: str = ""
    threads: int = 1
    device: str = "auto"
    max_sequences: int = 64
    cache_tokens: int = 16384
    identity: Path | None = None
    """Where its key lies; by default the first of this user's worker identities that no other process uses."""
    local_store: Path | None = None
    """The learner's snapshot store, where it is on this very machine: chunks are read there instead of fetched."""
    join_timeout_s: float = 30.0


def model_cache() -> Path:
    """Where converted models are kept."""
    return data_dir() / MODEL_CACHE


@contextmanager
def worker_identity(directory: Path | None) -> Iterator[Identity]:
    """A key that no other process of this machine uses while the context lasts."""
    if directory is not None:
        yield Identity.load_or_create(directory)
        return
    root = data_dir() / "workers"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in range(MAX_WORKERS_PER_MACHINE):
        with (root / f"{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield Identity.load_or_create(root / str(number))
            return
    raise StorageError(f"all {MAX_WORKERS_PER_MACHINE} worker identities in {root} are in use.")


@asynccontextmanager
async def working(
    fabric: Fabric,
    ticket: Ticket,
    options: WorkerOptions,
    *,
    role: NodeRole = "worker",
    progress: Progress = lambda _: None,
    on_event: Callable[[str, dict[str, Any]], None] = lambda *_: None,
) -> AsyncIterator[Worker]:
    """A worker that has joined the ticket's run and is ready to `run`.

    Raises:
        JoinRefused, NetworkError, ModelError, TaskError: why it cannot take part.
    """
    name = options.name or f"{socket.gethostname()}:{os.getpid()}"
    reply = await join(fabric, ticket, role, name, device=options.device, threads=options.threads)
    spec = work_spec(reply)
    environments = {env: make(what["type"], what["settings"], name=env) for env, what in spec.envs.items()}
    model = await asyncio.to_thread(resolve, spec.model, model_cache(), progress)
    engine = await asyncio.to_thread(
        LocalEngine,
        model,
        dtype=spec.dtype,
        device=options.device,
        threads=options.threads,
        max_sequences=options.max_sequences,
        cache_tokens=options.cache_tokens,
        context_tokens=spec.context_tokens,
    )
    scratch = data_dir() / "snapshots" / f"{ticket.run}-{fabric.identity.node_id}"
    store = Store(scratch, run=ticket.run, trusted_key=reply.learner_key, durable=False)
    fetcher = Fetcher(fabric, store, [reply.learner_key], local=options.local_store)

    async def source(version: int) -> Mapping[str, TensorView]:
        before = fetcher.bytes_fetched

        def on_progress(_: object) -> None:
            nonlocal before
            worker.fetched(fetcher.bytes_fetched - before)
            before = fetcher.bytes_fetched

        return (await fetcher.fetch(version, on_progress=on_progress)).tensors

    worker = Worker(
        RunLink(fabric, ticket, role, name, options.device, options.threads),
        spec,
        engine,
        environments,
        source,
        max_sequences=options.max_sequences,
        on_event=on_event,
    )
    hearing = asyncio.create_task(_hear(fabric, reply.learner_key, worker))
    try:
        await fabric.declare_alive()
        yield worker
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await engine.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(scratch)


async def _hear(fabric: Fabric, learner_key: bytes, worker: Worker) -> None:
    """Pass on the learner's announcements; heartbeats carry the newest version as well, so none is missed for long."""
    try:
        async with announcements(fabric, learner_key, "policy") as versions:
            async for version in versions:
                worker.published(version)
    except NetworkError as error:
        log.warning("announcements cannot be heard: %s", error)
