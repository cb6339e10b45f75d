"""A model served over stages: the ticket, the stages of this machine, the engine, and the end of all of them.

    `serving_over(model, …)` ──▶ folder with the ticket ──▶ children `shoal worker TICKET --stage` ──▶ engine

Invariants: a child that ends is started again, no sooner than `RESTART_S` after its last start, until the context ends;
none outlives this process, however it ends; the folder goes with the context.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.config import Serving
from shoal.coordinator.admission import Admission
from shoal.coordinator.processes import Child, Children
from shoal.coordinator.rundir import RunDir
from shoal.engine.pipeline.lanes import PipelineEngine
from shoal.engine.pipeline.ring import Rings
from shoal.engine.pipeline.weights import Shelf
from shoal.engine.source import LocalModel
from shoal.engine.speculation.speculating import Speculation
from shoal.errors import RunError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity, data_dir
from shoal.serving.stages import Stages

log = logging.getLogger("shoal.pipeline")

PREFIX = "serve-"
RESTART_S = 5.0
LOCAL_START_S = 300.0
"""Stages of this machine read their layers from its disk; whoever waits longer learns of it by 503."""

TICKET_LIFE_S = 30 * 24 * 3600.0
TICKET_USES = 1024
END_GRACE_S = 5.0


@dataclass(frozen=True)
class Served:
    """What the context gives."""

    engine: PipelineEngine
    stages: Stages
    ticket: str
    folder: Path
    """With the ticket in `ticket.txt` and the children's logs."""


@asynccontextmanager
async def serving_over(
    model: LocalModel, name: str, settings: Serving, speculate: Callable[[int, int], Speculation] | None = None
) -> AsyncIterator[Served]:
    """An engine over `settings.stages` stages, while inside.

    Args:
        speculate: makes what drafts for a lane (`speculation.speculations`).

    Raises:
        ModelError: the checkpoint can't be used.
        NetworkError: this machine has no such address.
    """
    run = _folder(data_dir() / "serving")
    rings = Rings(settings.stage_patience_s)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, run.path, True)
        stack.callback(run.close)
        engine = await asyncio.to_thread(
            PipelineEngine,
            model,
            rings,
            dtype=settings.dtype,
            lanes=settings.in_flight or settings.stages,
            threads=settings.threads,
            max_sequences=settings.max_sequences,
            cache_tokens=settings.cache_tokens,
            context_tokens=settings.context_tokens,
            prefill_tokens=settings.prefill_tokens,
            prefix_tokens=settings.prefix_tokens,
            speculate=speculate,
        )
        stack.push_async_callback(engine.close)
        identity = Identity.load_or_create(run.path / "identity")
        fabric = await stack.enter_async_context(await Fabric.listen(identity, settings.stage_host))
        # Nothing is trained here: the server itself stands where a run's learner would.
        admission = Admission(run, identity, identity.public_key)
        stages = Stages(
            fabric,
            admission,
            run.name,
            engine,
            rings,
            await asyncio.to_thread(Shelf, model),
            config=(model.directory / "config.json").read_bytes(),
            dtype=settings.dtype,
            model_name=name,
            wanted=settings.stages,
            host=settings.stage_host,
        )
        await stack.enter_async_context(stages)
        invite = admission.invite(("stage", "observer"), time.time(), life_s=TICKET_LIFE_S, uses=TICKET_USES)
        ticket = fabric.ticket(run.name, invite.secret).encode()
        run.write_atomic("ticket.txt", ticket.encode(), mode=0o600)
        local = settings.stages if settings.local_stages is None else settings.local_stages
        if local:
            await stack.enter_async_context(_children(run.path, model, settings, local))
        stack.callback(stages.ends)
        if local == settings.stages:
            await _started(stages)
        yield Served(engine, stages, ticket, run.path)


def _folder(parent: Path) -> RunDir:
    """A folder of this process's own; what processes that were killed left behind goes."""
    for left in parent.glob(f"{PREFIX}*"):
        old = RunDir(left)
        with contextlib.suppress(RunError, StorageError):  # somebody uses it, or it has just gone
            old.lock()
            shutil.rmtree(left, ignore_errors=True)
        old.close()
    name = f"{PREFIX}{secrets.token_hex(4)}"
    run = RunDir(parent / f".{name}")
    run.path.mkdir(parents=True, mode=0o700)
    run.lock()
    run.path = run.path.rename(parent / name)  # only now does another server see it, locked
    return run


async def _started(stages: Stages) -> None:
    """Wait until this machine's own stages have their layers, as one process would load them."""
    try:
        await asyncio.wait_for(stages.opened.wait(), LOCAL_START_S)
    except TimeoutError:
        log.warning("the stages are not ready after %.0f s; requests will find them later.", LOCAL_START_S)


@asynccontextmanager
async def _children(folder: Path, model: LocalModel, settings: Serving, count: int) -> AsyncIterator[None]:
    """Stages on this machine, kept alive while inside."""
    children = Children(folder)
    keepers = [asyncio.create_task(_keep(children, n, folder, model, settings)) for n in range(count)]
    try:
        yield
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        await children.end_all(END_GRACE_S)


async def _keep(children: Children, number: int, folder: Path, model: LocalModel, settings: Serving) -> None:
    name = f"stage-{number}"
    arguments = ["worker", str(folder / "ticket.txt"), "--stage", "--name", name]
    arguments += ["--identity", str(folder / name), "--local-model", str(model.directory)]
    arguments += ["--threads", str(settings.threads), "--device", settings.device, "--stage-host", settings.stage_host]
    while True:
        started = time.monotonic()
        child: Child = await children.start(name, arguments)
        await child.process.wait()
        children.all.remove(child)
        log.warning("%s ended with %s: %s", name, child.process.returncode, child.tail[-500:])
        await asyncio.sleep(max(0.0, started + RESTART_S - time.monotonic()))
