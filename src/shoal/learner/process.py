"""The learner's process: ask for a step's batch, train on it, publish, report; again until the run is over.

    run/audit ──▶ episodes to check, between steps (`auditing`) ──▶ run/audit
    run/batch(version) ──▶ Trainer.step ──▶ every κ versions: chunks, manifest, signature ──▶ run/step ──▶ announce
                                            every n versions: checkpoint ──▶ run/step

The learner is a deterministic consumer of a log of batches: killed at any moment it restarts from its newest
checkpoint at version c, asks for batch c again, and is given what it was given before. Versions it had published
before the kill are not published again.

Invariants: the weights that are published as version v are those after v steps; a report is sent after what it reports
is on disk; nobody hears of a version before the coordinator does, which would refuse its tokens; torch works in one
thread beside the loop, so chunks are served and questions answered while it trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from torch import Tensor

from shoal.broadcast.image import read_version
from shoal.broadcast.publisher import Publisher, SnapshotWriter
from shoal.broadcast.relay import relaying
from shoal.broadcast.store import Store
from shoal.config import Config
from shoal.engine.local import pick_device
from shoal.engine.merging import adapter_tensors, merged
from shoal.engine.source import LocalModel, resolve
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import to_views
from shoal.errors import NetworkError, RunError, ShoalError
from shoal.fabric.desk import Account, Desk
from shoal.fabric.endpoint import is_loopback
from shoal.fabric.errors import RemoteError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket
from shoal.fabric.waits import ENDLESS_S, waiting
from shoal.learner import checkpoint
from shoal.learner.auditing import Auditor, Turns
from shoal.learner.claims import ClaimChecker
from shoal.learner.leading import LeadingTrainer, continue_from
from shoal.learner.making import make_trainer
from shoal.learner.ranks import Ranks, is_rank, rank_device
from shoal.learner.trainer import StepMetrics, Trainer
from shoal.protocol.codec import encode
from shoal.protocol.trust import AuditReply, AuditRequest
from shoal.protocol.work import BatchReply, BatchRequest, StepReply, StepReport
from shoal.rollout.host import MODEL_USUAL_S, Sessions, WorkerOptions, model_cache, working
from shoal.rollout.link import Part, taking_part
from shoal.rollout.worker import Worker

log = logging.getLogger("shoal.learner")

BATCH_DEADLINE_S = 30.0
"""The coordinator answers within a few seconds, batch or not."""

EXTRA_VERSIONS = 2
"""Versions kept published beyond the S + 1 that leases may name: a slow fetch of an older one still ends."""

POLICY = "policy"


class LearnerProcess:
    """One run's learner.

    Args:
        directory: the run's folder.
        part: the learner's own, joined already.
    """

    def __init__(self, config: Config, directory: Path, fabric: Fabric, ticket: Ticket, part: Part) -> None:
        self._config = config
        self._directory = directory
        self._fabric = fabric
        self._link = part.link
        self._store = Store(
            directory / "snapshots",
            run=ticket.run,
            trusted_key=fabric.identity.public_key,
            durable=False,  # a snapshot can be made again from the checkpoint
            max_bytes=1e9 * (config.output.snapshots_gb or float("inf")),
        )
        self._writer = SnapshotWriter(self._store, fabric.identity, POLICY)
        self._publisher = Publisher(fabric, self._store, allow=part.member.is_granted)
        self._oldest_needed: int | None = None
        self._publish_every = config.learner.publish_every
        self._checkpoint_s = 0.0
        """What the last checkpoint took: part of the next step's time."""
        self._doing = "loads the model"
        self.worker: Worker | None = None
        """What samples in this very process, in colocated mode."""
        self._trainer: Trainer | None = None
        self._tokenizer: Tokenizer | None = None
        self._local: LocalModel | None = None
        self._turns = Turns(config.trust.learner_share)
        self._auditor = Auditor(self._ask_for_claims, self._make_checker, self._turns)

    async def run(self) -> None:
        """Train until the coordinator says that the run is over, and check what it wants to have checked."""
        auditing = asyncio.create_task(self._auditor.run())
        training = asyncio.create_task(self._train())
        try:
            await asyncio.wait([training, auditing], return_when=asyncio.FIRST_COMPLETED)
            if auditing.done():
                await auditing  # raises if that is why it ended; otherwise it was told first that the run is over
            await training
        finally:
            for task in (training, auditing):
                task.cancel()
            await asyncio.gather(training, auditing, return_exceptions=True)
        if isinstance(self._trainer, LeadingTrainer):
            self._trainer.end()

    async def _train(self) -> None:
        with waiting("the model to load", until="it is fetched and loaded", usual_s=MODEL_USUAL_S):
            trainer = self._trainer = await asyncio.to_thread(self._load)
        await self._publisher.start()
        await self._announce_start()
        if trainer.version >= self._config.run.steps:
            await self._save()
        while True:
            waited_from = asyncio.get_running_loop().time()
            async with self._turns.waiting():
                reply = await self._batch(trainer.version)
            if reply is None:
                return
            if reply.save:
                await self._save()
                continue
            assert reply.episodes is not None
            wait_s = asyncio.get_running_loop().time() - waited_from
            self._doing = f"trains step {trainer.version + 1}"
            async with self._turns.stepping():
                metrics = await asyncio.to_thread(trainer.step, reply.episodes)
            await self._finish_step(metrics, wait_s)

    @asynccontextmanager
    async def linking(self) -> AsyncIterator[None]:
        """Inside, workers on other machines may take chunks over direct links, and pass them on to each other."""
        host = self._config.network.host
        if is_loopback(host):
            yield
            return
        allow = self._publisher.allow
        async with relaying(self._fabric.identity, self._store, host, allow=allow) as (relay, record):
            self._publisher.offer_links(relay, record)
            yield

    async def _batch(self, version: int) -> BatchReply | None:
        """The batch of this version, however long it takes; None when the run is over."""
        self._doing = f"waits for the batch of step {version + 1}"
        what = f"the batch of step {version + 1}"
        with waiting(what, whom="coordinator", until="enough rollouts are in", usual_s=ENDLESS_S):
            return await self._ask_for_batch(version)

    async def _ask_for_batch(self, version: int) -> BatchReply | None:
        while True:
            try:
                reply = await self._link.call("batch", BatchRequest(version=version), BatchReply, BATCH_DEADLINE_S)
            except NetworkError as error:
                _raise_if_refused(error)
                log.warning("no batch yet: %s", error)
                await asyncio.sleep(1.0)
                continue
            if reply.ended:
                return None
            if reply.episodes is not None or reply.save:
                return reply

    async def _finish_step(self, metrics: StepMetrics, wait_s: float) -> None:
        """Publish, report, announce, checkpoint: in this order.

        The coordinator hears of a version before workers do, so that it knows whatever their tokens claim; and a
        checkpoint, which takes seconds, delays neither.
        """
        trainer, settings, loop = self._trainer, self._config.learner, asyncio.get_running_loop()
        assert trainer is not None
        version = trainer.version
        last = version >= self._config.run.steps
        started = loop.time()
        self._doing = f"publishes version {version}"
        published = await self._publish() if last or version % self._publish_every == 0 else None
        publish_s = loop.time() - started
        total_s = wait_s + metrics["train_s"] + publish_s + self._checkpoint_s
        timing = {
            "wait_s": wait_s,
            "publish_s": publish_s,
            **(self._weight() if published is not None else {}),
            "checkpoint_s": self._checkpoint_s,
            "utilisation": metrics["train_s"] / max(total_s, 1e-9),
            "tokens_per_s": metrics["tokens"] / max(total_s, 1e-9),
        }
        await self._report(version, {**metrics, **timing}, published=published)
        started = loop.time()
        if last or (settings.checkpoint_every and version % settings.checkpoint_every == 0):
            await self._save()
        self._checkpoint_s = loop.time() - started

    async def _save(self) -> None:
        """Keep the present version, and at the end the model; the run is not over before this is reported."""
        trainer = self._trainer
        assert trainer is not None
        self._doing = f"saves version {trainer.version}"
        checkpoints, keep = self._directory / "checkpoints", self._config.learner.keep_checkpoints
        await asyncio.to_thread(lambda: checkpoint.save(checkpoints, trainer.checkpoint(), keep=keep))
        if trainer.version >= self._config.run.steps:
            await asyncio.to_thread(self._save_model)
        await self._report(trainer.version, {}, checkpointed=True)

    async def _announce_start(self) -> None:
        """Tell the coordinator the newest version that workers can have: an earlier life's, or the present one."""
        assert self._trainer is not None
        newest = await asyncio.to_thread(self._store.latest, POLICY)
        if newest is None:
            await self._report(self._trainer.version, {}, published=await self._publish())
        else:
            await self._report(newest.manifest.version, {}, published=encode(newest.signed))

    def _weight(self) -> dict[str, float]:
        """What the version published last weighs: bytes that a worker fetches, and the share of values that moved."""
        size = self._writer.size
        assert size is not None
        return {
            "snapshot_bytes": float(size.change_bytes),
            "snapshot_changed": size.num_changed / max(size.num_values, 1),
            "snapshot_anchor": float(size.is_anchor),
        }

    async def _publish(self) -> bytes | None:
        """Put the present weights on the chain and give the signed manifest's bytes; None if an earlier life did."""
        trainer = self._trainer
        assert trainer is not None
        version = trainer.version
        newest = await asyncio.to_thread(self._store.latest, POLICY)
        if newest is not None and newest.manifest.version >= version:
            return None
        published = await asyncio.to_thread(lambda: self._writer.write(version, to_views(self._to_publish(trainer))))
        keep = self._config.learner.max_staleness + 1 + EXTRA_VERSIONS
        if self._oldest_needed is not None:
            versions = await asyncio.to_thread(self._store.versions, POLICY)
            keep = max(keep, sum(v >= self._oldest_needed for v in versions))
        await asyncio.to_thread(self._store.prune, POLICY, keep)
        return encode(published.signed)

    def _to_publish(self, trainer: Trainer) -> dict[str, Tensor]:
        lora = self._config.learner.lora
        if lora is None or lora.publish == "merged":
            return trainer.tensors()
        return adapter_tensors(trainer.trained(), lora.alpha, trainer.dtype)

    async def _report(
        self, version: int, metrics: StepMetrics, *, published: bytes | None = None, checkpointed: bool = False
    ) -> None:
        """Tell the coordinator, however long it takes; then everyone else of what was published."""
        report = StepReport(version=version, metrics=metrics, manifest=published, checkpointed=checkpointed)
        with waiting(f"the report of version {version} to arrive", whom="coordinator", until="it answers"):
            reply = await self._tell(report)
        self._oldest_needed = reply.oldest_version
        self._publish_every = reply.publish_every or self._config.learner.publish_every
        if published is not None:
            await self._publisher.announce(POLICY, version)

    async def _tell(self, report: StepReport) -> StepReply:
        while True:
            try:
                return await self._link.call("step", report, StepReply, BATCH_DEADLINE_S)
            except NetworkError as error:
                _raise_if_refused(error)
                log.warning("version %d is not reported yet: %s", report.version, error)
                await asyncio.sleep(1.0)

    def account(self) -> Account:
        """What the learner does, for whoever asks."""
        acting = self.worker.account() if self.worker is not None else None
        return Account(
            doing=self._doing if acting is None else f"{self._doing}; {acting.doing}",
            version=self._trainer.version if self._trainer is not None else -1,
            queues=acting.queues if acting is not None else (),
            rates=acting.rates if acting is not None else {},
            counters={
                "chunk bytes served": self._publisher.chunk_bytes_served,
                "episodes checked": self._auditor.num_checked,
                **(acting.counters if acting is not None else {}),
            },
            details=acting.details if acting is not None else {},
        )

    async def _ask_for_claims(self, request: AuditRequest) -> AuditReply:
        return await self._link.call("audit", request, AuditReply, BATCH_DEADLINE_S)

    def _make_checker(self) -> ClaimChecker:
        """A second body, for any version that is kept."""
        config, local = self._config, self._local
        assert self._tokenizer is not None and local is not None
        return ClaimChecker(
            local,
            self._tokenizer,
            lambda version: merged(local, read_version(self._store, POLICY, version)),
            dtype=config.model.dtype,
            device=pick_device(config.learner.device),
            context_tokens=config.model.context_tokens,
            on_swap=config.rollout.on_swap,
            seeds=config.trust.seeds,
        )

    def _load(self) -> Trainer:
        """The model, continued from the newest checkpoint if there is one."""
        local = self._local = resolve(self._config.model.name, model_cache())
        self._tokenizer = Tokenizer(local.directory)
        ranks = Ranks(rank_device(self._config.learner.device)) if is_rank() else None
        trainer = make_trainer(self._config, local, self._tokenizer, ranks)
        version = continue_from(trainer, self._directory / "checkpoints")
        if version is not None:
            log.info("continuing from the checkpoint of version %d", version)
        return trainer

    def _save_model(self) -> None:
        assert self._trainer is not None and self._tokenizer is not None
        self._trainer.save_pretrained(self._directory / "model", self._tokenizer.hf)


def _raise_if_refused(error: NetworkError) -> None:
    """End the process where the coordinator said no: asking again would not change its mind."""
    if isinstance(error, RemoteError) and error.kind == "refused":
        raise RunError(f"the coordinator refused what the learner said: {error.problem}", error.remedy) from error


async def run_learner(config: Config, directory: Path, ticket: Ticket, sessions: Sessions | None = None) -> None:
    """Be the learner of the run in `directory` until it is over.

    Args:
        sessions: how agent programs reach the model, in colocated mode; see `rollout.host.working`.
    """
    identity = Identity.load_or_create(directory / "identity" / "learner")
    async with await Fabric.connect(identity, ticket, config.network.join_timeout_s) as fabric:
        learner = config.learner
        async with taking_part(
            fabric, ticket, "learner", "learner", device=learner.device, threads=learner.threads
        ) as part:
            process = LearnerProcess(config, directory, fabric, ticket, part)
            desk = Desk(fabric, "learner", "learner", process.account, part.member.is_granted, device=learner.device)
            async with desk, process.linking():
                if learner.mode == "colocated":
                    await _run_colocated(process, config, directory, fabric, ticket, part, sessions)
                else:
                    await process.run()
                    with contextlib.suppress(ShoalError):  # The coordinator may be gone already.
                        await part.link.leave()


async def _run_colocated(
    process: LearnerProcess,
    config: Config,
    directory: Path,
    fabric: Fabric,
    ticket: Ticket,
    part: Part,
    sessions: Sessions | None,
) -> None:
    """The learner's own process acts, too; S = 0 makes sampling and training take turns."""
    workers = config.workers
    options = WorkerOptions(
        name="learner",
        threads=config.learner.threads,
        device=workers.device,
        max_sequences=workers.max_sequences,
        cache_tokens=workers.cache_tokens,
        prefix_tokens=workers.prefix_tokens,
        local_store=directory / "snapshots",
        allow_programs=True,
    )
    async with working(fabric, ticket, options, part=part, sessions=sessions) as worker:
        process.worker = worker
        acting, learning = asyncio.create_task(worker.run()), asyncio.create_task(process.run())
        try:
            await asyncio.wait([acting, learning], return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                await acting  # raises if that is why it ended; otherwise it was told first that the run is over
            await learning
        finally:
            worker.stop()
            learning.cancel()
            await asyncio.gather(acting, learning, return_exceptions=True)
