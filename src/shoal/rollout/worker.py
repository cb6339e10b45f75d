"""A worker: leases groups of rollouts, acts with the run's policy, submits; until the run ends or it is told to stop.

    lease ──▶ Policy.acting(version) ──▶ run_episode × G ──▶ submit        one task a lease
    heartbeat ──▶ progress out; newest version and dropped leases in       every heartbeat_s
    follow ──▶ newer snapshots staged and swapped while sampling           whenever one is heard of

Backpressure: it asks for a lease only while it has free sequence slots, and for none while one waits for an exact
version. Invariants: each lease ends in one submission, or is dropped because the coordinator said so; when the
coordinator is silent for `LOST_AFTER_S` the worker gives up with an error; stopping (`stop()`) finishes what runs
within `grace_s`, then says goodbye.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from shoal.engine.local import LocalEngine
from shoal.envs.base import Environment
from shoal.errors import NetworkError
from shoal.fabric.errors import RemoteError
from shoal.protocol.episode import Episode
from shoal.protocol.work import Lease, Submission, WorkSpec
from shoal.rollout.episode import EpisodeSpec, run_episode
from shoal.rollout.link import RunLink
from shoal.rollout.policy import Policy, Source

log = logging.getLogger("shoal.rollout")

LOST_AFTER_S = 120.0
"""A coordinator that has not answered for this long is taken for gone. Its restart takes less."""

RETRY_S = 1.0
"""Between tries when the coordinator does not answer."""

RATE_WINDOW_S = 30.0
"""Tokens a second are reported over this long."""


@dataclass
class _Job:
    """One lease at work."""

    lease: Lease
    tokens: int = 0
    task: asyncio.Task[None] | None = None


class Worker:
    """One worker process's loop.

    Args:
        link: to the run's coordinator.
        environments: by the names that tasks carry.
        source: fetches a policy version, verified.
        max_sequences: rollouts at once.
        on_event: told (kind, data) of what people may want to see.
    """

    def __init__(
        self,
        link: RunLink,
        spec: WorkSpec,
        engine: LocalEngine,
        environments: Mapping[str, Environment],
        source: Source,
        *,
        max_sequences: int,
        on_event: Callable[[str, dict[str, Any]], None] = lambda *_: None,
    ) -> None:
        self._link = link
        self._spec = spec
        self._engine = engine
        self._envs = environments
        self._max_sequences = max_sequences
        self._on_event = on_event
        self._jobs: dict[str, _Job] = {}
        self._stopping = asyncio.Event()
        self._news = asyncio.Event()
        self._last_answer = time.monotonic()
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

    async def run(self, grace_s: float = 30.0) -> None:
        """Work until the run ends or `stop` is called.

        Raises:
            NetworkError: the coordinator has been silent for too long.
        """
        side = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._follow())]
        leasing = asyncio.create_task(self._lease_loop())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([leasing, stopping, *side], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
            running = [job.task for job in self._jobs.values() if job.task]
            if running:
                await asyncio.wait(running, timeout=grace_s)
        finally:
            tasks = [leasing, stopping, *side, *(job.task for job in self._jobs.values() if job.task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(NetworkError):  # The coordinator may be gone already.
                await self._link.leave()

    async def _lease_loop(self) -> None:
        while not self._stopping.is_set():
            busy = sum(len(job.lease.tasks) for job in self._jobs.values())
            waits_for_exact = any(
                job.lease.exact_version and job.lease.min_version != self.policy.version for job in self._jobs.values()
            )
            if busy >= self._max_sequences or waits_for_exact:
                await asyncio.sleep(0.1)
                continue
            try:
                reply = await self._link.lease(self.policy.version, self._max_sequences - busy)
            except NetworkError as error:
                await self._unanswered(error)
                continue
            self._last_answer = time.monotonic()
            if reply.ended:
                return
            if reply.newest_version > self.policy.newest:
                self.published(reply.newest_version)
            if reply.lease is None:
                await asyncio.sleep(reply.wait_s)
                continue
            job = _Job(reply.lease)
            self._jobs[reply.lease.id] = job
            job.task = asyncio.create_task(self._work(job))

    async def _work(self, job: _Job) -> None:
        """One lease from start to submission."""
        lease = job.lease
        try:
            async with self.policy.acting(lease.min_version, exact=lease.exact_version):
                episodes = await asyncio.gather(*(self._episode(job, i) for i in range(len(lease.tasks))))
        except (NetworkError, OSError) as error:
            # The snapshot could not be had: nothing was acted, and the coordinator must know that it is void.
            reason = f"no policy version {lease.min_version}: {error}"[:1000]
            episodes = [self._void(lease, index, reason) for index in range(len(lease.tasks))]
        try:
            await self._submit(Submission(lease=lease.id, node_id=self._link.node_id, episodes=tuple(episodes)))
        finally:
            self._jobs.pop(lease.id, None)

    async def _submit(self, submission: Submission) -> None:
        """Repeat until the coordinator has answered: submissions are idempotent."""
        while True:
            try:
                await self._link.submit(submission)
                self._last_answer = time.monotonic()
                self.num_submitted += len(submission.episodes)
                return
            except RemoteError as error:
                if error.kind not in ("busy",):
                    log.warning("submission of lease %s refused: %s", submission.lease, error)
                    return
                await asyncio.sleep(RETRY_S)
            except NetworkError as error:
                await self._unanswered(error)

    async def _episode(self, job: _Job, index: int) -> Episode:
        lease = job.lease
        task = lease.tasks[index]

        def on_tokens(tokens: int) -> None:
            job.tokens += tokens

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
        return await run_episode(
            spec,
            self._engine,
            self._engine.tokenizer,
            env.fresh(),
            context_tokens=self._spec.context_tokens,
            on_tokens=on_tokens,
        )

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
        while True:
            await asyncio.sleep(self._spec.heartbeat_s)
            # Sequences in flight make progress too, long before their turn ends: the engine's own count shows it.
            drawn = self._engine.stats().tokens_drawn
            self._rate.append((time.monotonic(), drawn))
            progress = {lease_id: max(job.tokens, drawn) for lease_id, job in self._jobs.items()}
            try:
                reply = await self._link.heartbeat(self.policy.version, progress, self._tokens_per_s())
            except NetworkError as error:
                await self._unanswered(error)
                continue
            self._last_answer = time.monotonic()
            if reply.newest_version > self.policy.newest:
                self.published(reply.newest_version)
            for lease_id in reply.gone:
                job = self._jobs.pop(lease_id, None)
                if job is not None and job.task is not None:
                    job.task.cancel()
            if reply.ended:
                self._stopping.set()

    async def _follow(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.policy.follow()
            except NetworkError as error:
                log.info("version %d could not be fetched yet: %s", self.policy.newest, error)
                await asyncio.sleep(RETRY_S)

    async def _unanswered(self, error: NetworkError) -> None:
        silent_s = time.monotonic() - self._last_answer
        if silent_s > LOST_AFTER_S:
            raise NetworkError(
                f"the coordinator has not answered for {silent_s:.0f} s ({error.problem}).",
                "See whether the run still lives; the worker can join again with the same ticket.",
            )
        await asyncio.sleep(RETRY_S)

    def _swapped(self, version: int, fetched_s: float, pause_s: float) -> None:
        self._on_event("policy.swapped", {"version": version, "fetch_s": fetched_s, "pause_s": pause_s})

    def _tokens_per_s(self) -> float:
        now = time.monotonic()
        recent = [(t, n) for t, n in self._rate if now - t <= RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        (t0, n0), (t1, n1) = recent[0], recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
