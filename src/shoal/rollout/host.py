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
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.broadcast.fetch import Fetcher
from shoal.broadcast.fetch import Progress as FetchProgress
from shoal.broadcast.publisher import announcements
from shoal.broadcast.relay import relaying
from shoal.broadcast.store import Store
from shoal.broadcast.tensors import TensorView
from shoal.engine.local import LocalEngine, pick_device
from shoal.engine.merging import merged
from shoal.engine.source import LocalModel, Progress, resolve
from shoal.envs.base import Environment
from shoal.envs.external import commands
from shoal.envs.registry import make
from shoal.errors import NetworkError, StorageError, TaskError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.endpoint import Endpoint, is_loopback
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, data_dir
from shoal.fabric.ticket import Ticket
from shoal.fabric.waits import waiting
from shoal.protocol.roster import Billing
from shoal.protocol.work import Arrived, Fetching, WorkSpec
from shoal.rollout.external import ExternalActing
from shoal.rollout.external import Sessions as SessionDoor
from shoal.rollout.link import Part, taking_part, work_spec
from shoal.rollout.vllm_engine import VllmEngine, vllm_engine
from shoal.rollout.vllm_server import VllmOptions
from shoal.rollout.worker import Worker

log = logging.getLogger("shoal.rollout")

MAX_WORKERS_PER_MACHINE = 256
"""Identities tried before a machine is taken to be full."""

MODEL_CACHE = "models"

MODEL_USUAL_S = 60.0
"""Fetching a model may take longer, and is then worth a line."""


@dataclass(frozen=True)
class WorkerOptions:
    """What the machine's owner decides about a worker."""

    name: str = ""
    threads: int = 1
    device: str = "auto"
    max_sequences: int = 64
    cache_tokens: int = 16384
    prefix_tokens: int = 0
    identity: Path | None = None
    """Where its key lies; by default the first of this user's worker identities that no other process uses."""
    local_store: Path | None = None
    """The learner's snapshot store, where it is on this very machine: chunks are read there instead of fetched."""
    relay_host: str = ""
    """Address on which other workers may take snapshots' chunks from this one; empty: chunks come through the fabric,
    and are not passed on."""
    snapshots_gb: float | None = None
    """What snapshots may take on this machine's disk; they are removed at the end in any case."""
    join_timeout_s: float = 30.0
    price_usd_per_hour: float = 0.0
    """What its owner wants for it, or pays for it; told to the run."""
    billing: Billing = "per_use"
    """Whether that is paid by the second of work, or for each begun hour; told to the run."""
    region: str = ""
    """Where it stands, in its owner's words; told to the run."""
    allow_programs: bool = False
    """Start the agent programs that the run's configuration names. They are not confined."""
    engine: Literal["local", "vllm"] = "local"
    """What samples: our own engine, or vLLM's server in an environment of its own."""
    vllm: VllmOptions = field(default_factory=VllmOptions)


Sessions = Callable[[LocalEngine], AbstractAsyncContextManager[SessionDoor]]
"""Opens, over an engine, what agent programs reach the model through."""


def model_cache() -> Path:
    """Where converted models are kept."""
    return data_dir() / MODEL_CACHE


@contextmanager
def worker_identity(directory: Path | None, kind: str = "workers") -> Iterator[Identity]:
    """A key that no other process of this machine uses while the context lasts.

    Args:
        kind: whose keys, as a folder below the user's data directory; its first free one is taken.
    """
    if directory is not None:
        yield Identity.load_or_create(directory)
        return
    root = data_dir() / kind
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
    part: Part | None = None,
    sessions: Sessions | None = None,
    progress: Progress = lambda _: None,
    on_event: Callable[[str, dict[str, Any]], None] = lambda *_: None,
) -> AsyncIterator[Worker]:
    """A worker that has joined the ticket's run and is ready to `run`.

    Args:
        part: where this node has joined already, in another role beside this one.
        sessions: how agent programs reach the model, where the run has such; needs `allow_programs`.

    Raises:
        JoinRefused, NetworkError, ModelError, TaskError: why it cannot take part.
    """
    ready: list[Worker] = []

    def account() -> Account:
        return ready[0].account() if ready else Account(doing="loads the model")

    async with AsyncExitStack() as stack:
        if part is None:
            name = options.name or f"{socket.gethostname()}:{os.getpid()}"
            part = await stack.enter_async_context(_joining(fabric, ticket, name, options))
            desk = Desk(fabric, name, "worker", account, part.member.is_granted, device=options.device)
            await stack.enter_async_context(desk)
        work = await _read(part, options, progress)
        engine = await stack.enter_async_context(_engine(work, options))
        async with _worker(fabric, ticket, options, part, work, engine, sessions, on_event) as worker:
            ready.append(worker)
            yield worker


@dataclass(frozen=True)
class _Work:
    """What a run wants its workers to do, and what it takes."""

    spec: WorkSpec
    environments: Mapping[str, Environment]
    has_programs: bool
    model: LocalModel


async def _read(part: Part, options: WorkerOptions, progress: Progress) -> _Work:
    """What the run's answer says, and whether this machine will do it."""
    spec = work_spec(part.reply)
    environments = {env: make(what["type"], what["settings"], name=env) for env, what in spec.envs.items()}
    programs = commands(list(environments.values()))
    if programs and not options.allow_programs:
        raise TaskError(
            f"the run would have this machine start {' '.join(programs[0])[:200]!r}.",
            "Where you trust whoever started the run: shoal worker --allow-programs.",
        )
    if options.engine == "vllm" and programs:
        raise TaskError("agent programs reach the model through the local engine only.", "Leave --engine vllm out.")
    if options.engine == "vllm" and spec.seeded:
        raise TaskError(
            "the run checks that tokens are those its seeds draw, and vLLM draws others.",
            "Whoever started it can set trust.seeds = false, and what that costs is in docs/trust.md.",
        )
    with waiting(f"model {spec.model!r} to be here", until="it is fetched and converted", usual_s=MODEL_USUAL_S):
        model = await asyncio.to_thread(resolve, spec.model, model_cache(), progress)
    return _Work(spec, environments, bool(programs), model)


@asynccontextmanager
async def _engine(work: _Work, options: WorkerOptions) -> AsyncIterator[LocalEngine | VllmEngine]:
    """What samples, of the kind that the machine's owner chose."""
    spec = work.spec
    async with AsyncExitStack() as stack:
        with waiting("the engine to start", until="its weights are loaded", usual_s=MODEL_USUAL_S):
            if options.engine == "vllm":
                vllm = await stack.enter_async_context(
                    vllm_engine(
                        work.model,
                        spec,
                        options.vllm,
                        device=options.device,
                        threads=options.threads,
                        max_sequences=options.max_sequences,
                        cache_tokens=options.cache_tokens,
                    )
                )
            else:
                local = await asyncio.to_thread(
                    LocalEngine,
                    work.model,
                    dtype=spec.dtype,
                    device=options.device,
                    threads=options.threads,
                    max_sequences=options.max_sequences,
                    cache_tokens=options.cache_tokens,
                    prefix_tokens=options.prefix_tokens,
                    context_tokens=spec.context_tokens,
                    on_swap=spec.on_swap,
                )
                stack.push_async_callback(local.close)
        yield vllm if options.engine == "vllm" else local


def _joining(fabric: Fabric, ticket: Ticket, name: str, options: WorkerOptions) -> AbstractAsyncContextManager[Part]:
    return taking_part(
        fabric,
        ticket,
        "worker",
        name,
        device=str(pick_device(options.device)),
        threads=options.threads,
        measures_rates=options.local_store is None and not _is_near(ticket),
        price_usd_per_hour=options.price_usd_per_hour,
        billing=options.billing,
        region=options.region,
    )


def _is_near(ticket: Ticket) -> bool:
    """Whether the run is on this very machine, and on no other."""
    return bool(ticket.endpoints) and all(is_loopback(Endpoint.parse(text).host) for text in ticket.endpoints)


@asynccontextmanager
async def _worker(
    fabric: Fabric,
    ticket: Ticket,
    options: WorkerOptions,
    part: Part,
    work: _Work,
    engine: LocalEngine | VllmEngine,
    sessions: Sessions | None,
    on_event: Callable[[str, dict[str, Any]], None],
) -> AsyncIterator[Worker]:
    learner_key, member = part.reply.learner_key, part.member
    spec, model = work.spec, work.model
    scratch = data_dir() / "snapshots" / f"{ticket.run}-{fabric.identity.node_id}"
    limit = 1e9 * (options.snapshots_gb or float("inf"))
    store = Store(scratch, run=ticket.run, trusted_key=learner_key, durable=False, max_bytes=limit)
    links = AsyncExitStack()
    relay, record = None, None
    if options.relay_host:
        opened = relaying(fabric.identity, store, options.relay_host, allow=member.is_granted)
        relay, record = await links.enter_async_context(opened)
    fetcher = Fetcher(fabric, store, [learner_key], local=options.local_store, relay=relay, record=record)
    # Open from the first attempt to the last, however many the network takes, and moved by every chunk.
    weights = waiting("weights", whom=learner_key, until="they are here")

    async def source(version: int) -> Mapping[str, TensorView]:
        weights.what = f"the weights of version {version}"
        if not weights.is_open:
            weights.begin()
        try:
            with weights.parts():
                found = await fetch(version)
        except (NetworkError, TimeoutError):
            raise  # Whoever asked for it asks again.
        except BaseException:
            weights.end()
            raise
        weights.end()
        return found

    async def fetch(version: int) -> Mapping[str, TensorView]:
        before = fetcher.bytes_fetched

        def on_progress(now: FetchProgress) -> None:
            nonlocal before
            weights.moved()
            worker.arrivals.fetching = Fetching(**now._asdict())
            worker.fetched(fetcher.bytes_fetched - before)
            before = fetcher.bytes_fetched

        # The chain's key is fixed for the run; that the run still lets it publish is asked each time.
        member.require(learner_key, "learner")
        with member.transferring():
            try:
                snapshot = await fetcher.fetch(version, on_progress=on_progress)
            except RemoteError as error:
                if error.kind != "stranger":
                    raise
                await member.introduce(learner_key)
                snapshot = await fetcher.fetch(version, on_progress=on_progress)
        worker.arrivals.here(Arrived(version=snapshot.version, **snapshot.arrival._asdict()))
        return await asyncio.to_thread(merged, model, snapshot.tensors)

    external = None
    if work.has_programs and sessions is not None and isinstance(engine, LocalEngine):
        external = ExternalActing(await links.enter_async_context(sessions(engine)), context_tokens=spec.context_tokens)
        links.push_async_callback(external.close)
    worker = Worker(
        part.link,
        spec,
        engine,
        work.environments,
        source,
        max_sequences=options.max_sequences,
        external=external,
        on_event=on_event,
    )
    side = [asyncio.create_task(_hear(fabric, learner_key, worker))]
    if record is not None:
        side.append(asyncio.create_task(_introduce(fetcher)))
    try:
        yield worker
    finally:
        for task in side:
            task.cancel()
        await asyncio.gather(*side, return_exceptions=True)
        weights.end()
        fetcher.close()
        await links.aclose()
        with contextlib.suppress(OSError):
            shutil.rmtree(scratch)


async def _introduce(fetcher: Fetcher) -> None:
    """Be among those with whom the next version is shared; who is not yet there when it comes just takes it."""
    try:
        await fetcher.introduce()
    except NetworkError as error:
        log.info("this node will be introduced with its first fetch: %s", error)


async def _hear(fabric: Fabric, learner_key: bytes, worker: Worker) -> None:
    """Pass on the learner's announcements; heartbeats carry the newest version as well, so none is missed for long."""
    try:
        async with announcements(fabric, learner_key, "policy") as versions:
            async for version in versions:
                worker.published(version)
    except NetworkError as error:
        log.warning("announcements cannot be heard: %s", error)
