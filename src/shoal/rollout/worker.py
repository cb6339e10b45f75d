"""A worker: leases groups of rollouts, acts with the run's policy, submits; until the run ends or it is told to stop.

    lease ──▶ Policy.acting(version) ──▶ run_episode × G ──▶ submit        one task a lease
    heartbeat ──▶ progress out; newest version and dropped leases in       every heartbeat_s
    follow ──▶ newer snapshots staged and swapped while sampling           whenever one is heard of

Backpressure: it asks for a lease only while it has free sequence slots, and for none while one waits for an exact
version. Invariants: each lease ends in one submission, or is dropped because the coordinator said so; a lease shows
progress only while tokens are drawn for it or its policy arrives, so one that is stuck is lost; whatever fails on this
side is void and says why, and an engine that has failed ends the worker with that error; when the coordinator is silent
for too long (`patience`) the worker gives up with an error; stopping (`stop()`) finishes what runs within `grace_s`,
then says goodbye.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from shoal.engine.local import MAX_REQUESTS, LocalEngine
from shoal.envs.base import Environment
from shoal.envs.external import External
from shoal.errors import ModelError, NetworkError, ShoalError
from shoal.fabric.desk import Account
from shoal.fabric.errors import RemoteError
from shoal.fabric.waits import waiting
from shoal.protocol.episode import Episode
from shoal.protocol.status import QueueState
from shoal.protocol.work import Lease, Submission, WorkSpec
from shoal.rollout.arrivals import Arrivals
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.external import ExternalActing
from shoal.rollout.job import Job
from shoal.rollout.link import DEADLINE_S, RunLink
from shoal.rollout.patience import LOST_AFTER_S, RETRY_S, Patience
from shoal.rollout.policy import Policy, Source
from shoal.rollout.vllm_engine import VllmEngine

log = logging.getLogger("shoal.rollout")

LARGEST_GROUP = 4096
"""An idle worker takes a group of any size: what does not fit its slots waits in the engine."""

FETCH_UNIT_BYTES = 1024
"""Fetching this much counts as much progress as drawing a token."""

RATE_WINDOW_S = 30.0
"""Tokens a second are reported over this long."""


class Worker:
    """One worker process's loop.

    Args:
        link: to the run's coordinator.
        environments: by the names that tasks carry.
        source: fetches a policy version, verified.
        max_sequences: rollouts at once.
        external: acts where an environment's agent is a program of its own; absent: such rollouts are void.
        on_event: told (kind, data) of what people may want to see.
    """

    def __init__(
        self,
        link: RunLink,
        spec: WorkSpec,
        engine: LocalEngine | VllmEngine,
        environments: Mapping[str, Environment],
        source: Source,
        *,
        max_sequences: int,
        external: ExternalActing | None = None,
        on_event: Callable[[str, dict[str, Any]], None] = lambda *_: None,
    ) -> None:
        self._external = external
        self._link = link
        self._spec = spec
        self._engine = engine
        self._envs = environments
        self._max_sequences = max_sequences
        self._on_event = on_event
        self._jobs: dict[str, Job] = {}
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._bytes_fetched = 0
        self.arrivals = Arrivals()
        self._news = asyncio.Event()
        self._patience = Patience()
        self._rate: deque[tuple[float, int]] = deque(maxlen=256)
        self.policy = Policy(engine, source, self._swapped)
        self.num_submitted = 0

    def stop(self) -> None:
        """Take no more leases; `run` returns when those at work are submitted or its grace is over."""
        self._stopping.set()

    def published(self, version: int) -> None:
        """A newer version is out."""
        self.policy.heard_of(version)
        self._news.set()

    def fetched(self, num_bytes: int) -> None:
        """Part of a snapshot has arrived."""
        self._bytes_fetched += num_bytes

    async def run(self, grace_s: float = 30.0) -> None:
        """Work until the run ends or `stop` is called.

        Raises:
            NetworkError: the coordinator has been silent for too long.
            ModelError: the engine has failed.
        """
        self._patience.answered()
        side = [asyncio.create_task(part) for part in (self._heartbeats(), self._follow(), self._patience.tell())]
        leasing = asyncio.create_task(self._lease_loop())
        stopping = asyncio.create_task(self._stopping.wait())
        over = asyncio.create_task(self._over.wait())
        try:
            ends: list[asyncio.Future[Any]] = [leasing, stopping, over, self._failed, *side]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            leasing.cancel()
            await self._drain(grace_s, over)
            for task in done:
                task.result()
        finally:
            tasks = [leasing, stopping, over, *side, *(job.task for job in self._jobs.values() if job.task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._failed.done():
                self._failed.exception()
            with contextlib.suppress(ShoalError):  # The coordinator may be gone already.
                await self._link.leave()

    async def _drain(self, grace_s: float, over: asyncio.Task[Any]) -> None:
        """Let what runs end; when the run is over, nobody needs it."""
        deadline = time.monotonic() + grace_s
        while (left_s := deadline - time.monotonic()) > 0 and not over.done():
            running = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
            if not running:
                return
            await asyncio.wait([*running, over], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    async def _lease_loop(self) -> None:
        while True:
            busy = sum(len(job.lease.tasks) for job in self._jobs.values())
            waits_for_exact = any(
                job.lease.exact_version and job.lease.min_version != self.policy.version for job in self._jobs.values()
            )
            if busy >= self._max_sequences or waits_for_exact:
                await asyncio.sleep(0.1)
                continue
            free_slots = self._max_sequences - busy if busy else max(self._max_sequences, LARGEST_GROUP)
            try:
                with waiting("an answer to its question for a lease", whom="coordinator", deadline_s=DEADLINE_S):
                    reply = await self._link.lease(self.policy.version, free_slots)
            except NetworkError as error:
                await self._patience.unanswered(error)
                continue
            self._patience.answered()
            if reply.ended:
                self._over.set()
                return
            if reply.newest_version > self.policy.newest:
                self.published(reply.newest_version)
            if reply.lease is None:
                await asyncio.sleep(reply.wait_s)
                continue
            job = Job(reply.lease, self._engine, self._fail)
            self._jobs[reply.lease.id] = job
            job.task = asyncio.create_task(self._work(job))
            job.task.add_done_callback(self._worked)

    async def _work(self, job: Job) -> None:
        """One lease from start to submission."""
        lease = job.lease
        try:
            await self.policy.reach(lease.min_version, exact=lease.exact_version)
            with self.policy.acting(exact=lease.exact_version):
                job.acting = True
                episodes = await asyncio.gather(*(self._episode(job, i) for i in range(len(lease.tasks))))
        except (ShoalError, OSError) as error:
            # The snapshot could not be had: nothing was acted, and the coordinator must know that it is void.
            if isinstance(error, ModelError):
                self._fail(error)
            reason = f"no policy version {lease.min_version}: {error}"[:1000]
            episodes = [self._void(lease, index, reason) for index in range(len(lease.tasks))]
        await self._submit(Submission(lease=lease.id, node_id=self._link.node_id, episodes=tuple(episodes)))
        self._jobs.pop(lease.id, None)

    def _worked(self, task: asyncio.Task[None]) -> None:
        """A job has ended: by its submission, by cancellation, or by a defect that must not go unseen."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the worker with this error, after what it holds has been handed in."""
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _submit(self, submission: Submission) -> None:
        """Repeat until the coordinator has answered: submissions are idempotent."""
        with waiting(f"the verdict on lease {submission.lease}", whom="coordinator", deadline_s=LOST_AFTER_S):
            await self._submit_until_answered(submission)

    async def _submit_until_answered(self, submission: Submission) -> None:
        while True:
            try:
                reply = await self._link.submit(submission)
                self._patience.answered()
                told = Counter(reply.verdicts.values())
                group = submission.episodes[0].group if submission.episodes else "of nothing"
                log.info("group %s: %s", group, ", ".join(f"{n} {what}" for what, n in told.items()))
                self.num_submitted += len(submission.episodes)
                return
            except RemoteError as error:
                if error.kind not in ("busy",):
                    log.warning("submission of lease %s refused: %s", submission.lease, error)
                    return
                await asyncio.sleep(RETRY_S)
            except NetworkError as error:
                await self._patience.unanswered(error)

    async def _episode(self, job: Job, index: int) -> Episode:
        lease = job.lease
        task = lease.tasks[index]
        spec = EpisodeSpec(
            id=f"{lease.id}/{index}",
            group=lease.group,
            index=index,
            task=task,
            params=replace(lease.params, seed=lease.seeds[index]),
            min_version=lease.min_version,
            worker=self._link.node_id,
        )
        env = self._envs.get(task.env)
        if env is None:
            return self._void(lease, index, f"this worker has no environment '{task.env}'")
        if isinstance(env, External):
            return await self._program(job, spec, env)
        return await run_episode(
            spec, job, self._engine.tokenizer, env.fresh(), context_tokens=self._spec.context_tokens
        )

    async def _program(self, job: Job, spec: EpisodeSpec, env: External) -> Episode:
        if self._external is None:
            return self._void(job.lease, spec.index, "this worker starts no programs (shoal worker --allow-programs)")
        job.num_programs += 1
        try:
            return await self._external.run_episode(spec, env, job.draws)
        finally:
            job.num_programs -= 1

    def _void(self, lease: Lease, index: int, reason: str) -> Episode:
        now = time.time()
        return Episode(
            id=f"{lease.id}/{index}",
            group=lease.group,
            index=index,
            task=lease.tasks[index],
            turns=(),
            outcome="void",
            void_reason=reason,
            temperature=lease.params.temperature,
            worker=self._link.node_id,
            started_at=now,
            finished_at=now,
        )

    async def _heartbeats(self) -> None:
        last_drawn = last_fetched = 0
        while True:
            await asyncio.sleep(self._spec.heartbeat_s)
            # Sequences in flight make progress too, long before their turn ends: the engine's own count shows it.
            drawn, fetched = self._engine.stats().tokens_drawn, self._bytes_fetched // FETCH_UNIT_BYTES
            self._rate.append((time.monotonic(), drawn))
            for job in self._jobs.values():
                job.progress += (drawn - last_drawn) if job.num_drawing else 0
                job.progress += job.num_programs
                job.progress += (fetched - last_fetched) if not job.acting else 0
            last_drawn, last_fetched = drawn, fetched
            progress = {lease_id: job.progress for lease_id, job in self._jobs.items()}
            try:
                with waiting("an answer to its heartbeat", whom="coordinator", deadline_s=DEADLINE_S):
                    fetching, told = self.arrivals.fetching, self.arrivals.untold
                    reply = await self._link.heartbeat(
                        self.policy.version, progress, self._tokens_per_s(), fetching=fetching, arrived=told
                    )
            except NetworkError as error:
                await self._patience.unanswered(error)
                continue
            self._patience.answered()
            self.arrivals.told(told)
            if reply.newest_version > self.policy.newest:
                self.published(reply.newest_version)
            for lease_id in reply.gone:
                job_gone = self._jobs.pop(lease_id, None)
                if job_gone is not None and job_gone.task is not None:
                    job_gone.task.cancel()
            if reply.ended:
                self._over.set()

    async def _follow(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.policy.follow()
            except ModelError:
                raise
            except (ShoalError, OSError) as error:
                # The next lease asks for a version that it needs, and says so where it cannot be had.
                log.warning("version %d could not be fetched yet: %s", self.policy.newest, error)
                await asyncio.sleep(RETRY_S)

    def account(self) -> Account:
        """What this worker does, for whoever asks."""
        stats = self._engine.stats()
        acting = [job for job in self._jobs.values() if job.acting]
        rollouts = sum(len(job.lease.tasks) for job in acting)
        if self._patience.is_tried:
            doing = f"has had no answer of the coordinator for {self._patience.silent_s:.0f} s"
        elif acting:
            doing = f"samples {rollouts} rollouts under version {self.policy.version}"
        elif self._jobs:
            doing = f"gets version {self.policy.newest}{self.arrivals.share}"
        else:
            doing = "has no lease"
        held = "\n".join(
            f"{job.lease.id} version {job.lease.min_version}{' exactly' if job.lease.exact_version else ''}: "
            f"{len(job.lease.tasks)} rollouts, {job.progress} tokens, {'acts' if job.acting else 'waits'}"
            for job in self._jobs.values()
        )
        return Account(
            doing=doing,
            version=self.policy.version,
            queues=(
                QueueState(name="rollouts", length=rollouts, bound=self._max_sequences),
                QueueState(name="sequences sampled", length=stats.live, bound=self._max_sequences),
                QueueState(name="sequences waiting", length=stats.waiting, bound=MAX_REQUESTS),
            ),
            rates={"tokens": self._tokens_per_s()},
            counters={
                "rollouts submitted": self.num_submitted,
                "tokens drawn": stats.tokens_drawn,
                "bytes fetched": self._bytes_fetched,
            },
            details={"leases": held or "none"},
        )

    def _swapped(self, version: int, fetched_s: float, pause_s: float) -> None:
        self._on_event("policy.swapped", {"version": version, "fetch_s": fetched_s, "pause_s": pause_s})

    def _tokens_per_s(self) -> float:
        now = time.monotonic()
        recent = [(t, n) for t, n in self._rate if now - t <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        (t0, n0), (t1, n1) = recent[0], recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
