"""The run's decisions: who acts on what, what is accepted, which batch comes next, when the run is over.

    lease()  ──▶ evaluation first, then a group that admission lets start
    submit() ──▶ verified ──▶ whole groups to the queue, answers to the evaluation
    batch()  ──▶ the step's batch, formed once (sweep inside), handed out as often as asked
    stepped() ─▶ the version rises; a published manifest raises what workers are asked for
    tick()   ──▶ leases without progress end; their groups wait to be leased again

One asyncio task at a time is inside (no awaits but for re-scoring); time is an argument. What a lease book, a queue
and a staleness bound guarantee is stated and tested in `planning`; here is only how they meet.

Invariants: nothing enters a batch that was not leased, verified and whole; the run ends when `steps` steps are done
and every evaluation asked for has its result.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.config import Config
from shoal.coordinator.evaluation import EvalRound
from shoal.coordinator.journal import Journal
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.tasks import TaskSource
from shoal.coordinator.verification import mismatch, rescored
from shoal.envs.base import Environment
from shoal.errors import RunError
from shoal.planning.leases import LeaseBook
from shoal.planning.queue import GroupQueue
from shoal.protocol.codec import builtins, to_json
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import SamplingParams
from shoal.protocol.work import BatchReply, Lease, LeaseReply, StepReport, Submission

WAIT_S = 0.25
"""A worker without a lease asks again after this long."""

MAX_VOID_ATTEMPTS = 8
"""A group whose rollouts were void this often shows a broken environment or worker image, not bad luck."""

EVAL_PROGRESS_FACTOR = 4
"""An evaluation's lease may be silent this many times longer: it is larger, and nothing waits but people."""


@dataclass
class _Leased:
    """A running lease and what it is for: a group's number, or an evaluation."""

    lease: Lease
    number: int | None
    round: EvalRound | None


class Control:
    """One run's state. `clock` values are seconds on one monotonic clock."""

    def __init__(self, config: Config, environments: Mapping[str, Environment], run: RunDir) -> None:
        self.config = config
        self._envs = environments
        self._run = run
        self._tasks = TaskSource(config, environments)
        self._journal = Journal(run)
        self.book = LeaseBook()
        self.queue = GroupQueue(
            groups_per_step=config.rollout.groups_per_step,
            max_staleness=config.learner.max_staleness,
            window=config.rollout.window_groups,
        )
        interrupted = self._journal.replay(self.queue)
        self.version = 0
        """The learner's version: steps done."""
        self.published = -1
        """The newest version that workers can have; -1 before the first."""
        self.lost = Counter[str]()
        """Groups leased again, by reason."""
        if interrupted:
            self.lost["interrupted"] += interrupted
        self._leased: dict[str, _Leased] = {}
        self._void_attempts = Counter[int]()
        self.name_of: Callable[[str], str] = str
        """What people call a node, by its id."""
        self._batch_facts: dict[str, int] = {}
        self._consumed_by: Counter[str] = Counter(json.loads(self._load("workers.json", "{}")))
        self._logged_step = self._last_logged_step()
        self.max_staleness_seen = 0
        self.rounds: dict[int, EvalRound] = {}
        self.results: dict[int, dict[str, float]] = self._load_results()
        self._heldout = self._tasks.heldout() if self._wants_eval() else []
        self.failure: RunError | None = None

    # What the run still needs

    def _wants_eval(self) -> bool:
        section = self.config.eval
        return section.before or section.after or section.every > 0

    def _eval_due(self, version: int) -> bool:
        section, last = self.config.eval, self.config.run.steps
        if version == 0:
            return section.before
        if version == last:
            return section.after
        return section.every > 0 and version % section.every == 0

    @property
    def steps_done(self) -> bool:
        return self.version >= self.config.run.steps

    @property
    def ended(self) -> bool:
        """Nothing is left to do."""
        waiting = any(v not in self.results for v in self.rounds)
        last = self.config.run.steps
        final_ready = not self._eval_due(last) or last in self.results
        return self.failure is not None or (self.steps_done and not waiting and final_ready)

    # Workers

    def lease(self, node_id: str, free_slots: int, now: float) -> LeaseReply:
        """Work for a node with `free_slots` free, or how long to wait."""
        newest = max(0, self.published)
        if self.ended:
            return LeaseReply(ended=True, newest_version=newest)
        lease = None
        if self.published >= 0:
            lease = self._eval_lease(node_id, free_slots, now) or self._train_lease(node_id, free_slots, now)
        return LeaseReply(lease=lease, wait_s=WAIT_S, newest_version=newest)

    def _eval_lease(self, node_id: str, free_slots: int, now: float) -> Lease | None:
        for round_ in self.rounds.values():
            lease_id = f"e{round_.version}.{secrets.token_hex(4)}"
            indices = round_.lease(lease_id, free_slots)
            if not indices:
                continue
            lease = Lease(
                id=lease_id,
                kind="eval",
                group=lease_id,
                tasks=tuple(round_.tasks[i] for i in indices),
                seeds=tuple(indices),
                params=SamplingParams(
                    max_tokens=self.config.eval.max_tokens, temperature=0.0, stop=self.config.rollout.stop
                ),
                min_version=round_.version,
                exact_version=True,
                duration_s=self.config.rollout.lease_timeout_s * EVAL_PROGRESS_FACTOR,
            )
            self._leased[lease_id] = _Leased(lease, None, round_)
            self.book.grant(lease_id, node_id, len(indices), lease.duration_s, now)
            return lease
        return None

    def _train_lease(self, node_id: str, free_slots: int, now: float) -> Lease | None:
        rollout, learner = self.config.rollout, self.config.learner
        size = rollout.group_size
        if free_slots < size:
            return None
        number = self.queue.start(self.published, self.config.run.steps)
        if number is None:
            return None
        self._journal.note("start", number)
        lease_id = f"g{number}.{secrets.token_hex(4)}"
        lease = Lease(
            id=lease_id,
            kind="train",
            group=f"g{number}",
            tasks=(self._tasks.group(number),) * size,
            seeds=self._tasks.seeds(number, size),
            params=SamplingParams(
                max_tokens=rollout.max_tokens, temperature=rollout.temperature, stop=rollout.stop
            ),
            min_version=self.published,
            exact_version=learner.mode != "async",
            duration_s=rollout.lease_timeout_s,
        )
        self._leased[lease_id] = _Leased(lease, number, None)
        self.book.grant(lease_id, node_id, size, lease.duration_s, now)
        return lease

    def heartbeat(self, node_id: str, leases: Mapping[str, int], now: float) -> tuple[str, ...]:
        """Note progress; gives the leases that the node no longer holds."""
        return tuple(i for i, tokens in leases.items() if not self.book.progress(i, node_id, tokens, now))

    async def submit(self, submission: Submission, node_id: str) -> dict[str, str]:
        """Verify a lease's episodes and close it; gives each episode's verdict."""
        held = self._leased.get(submission.lease)
        holding = self.book.running.get(submission.lease)
        if held is None or holding is None or holding.node_id != node_id:
            how = self.book.ended.get(submission.lease, "unknown")
            return {e.id: "duplicate" if how == "finished" else "late" for e in submission.episodes}
        verdicts, problems = await self._verdicts(held.lease, submission.episodes)
        if self.book.running.get(submission.lease) is not holding:
            return {e.id: "late" for e in submission.episodes}  # it expired while being checked
        del self._leased[submission.lease]
        whole = all(v == "accepted" for v in verdicts) and len(submission.episodes) == len(held.lease.tasks)
        if held.round is not None:
            answers = [e if v == "accepted" else None for e, v in zip(submission.episodes, verdicts, strict=False)]
            answers += [None] * (len(held.lease.tasks) - len(answers))
            held.round.answered(submission.lease, answers)
            self._close(submission.lease, node_id, verdicts, len(held.lease.tasks))
            self._note_problems(node_id, problems)
            self._finish_round(held.round)
        elif held.number is not None and whole:
            self._close(submission.lease, node_id, verdicts, len(held.lease.tasks))
            self._journal.accept(held.number, min(e.version for e in submission.episodes), submission.episodes)
            self.queue.finish(held.number, min(e.version for e in submission.episodes))
        elif held.number is not None:
            # Groups stay whole: what was fine in an incomplete group is void with it, and the group is leased again.
            verdicts = ["void" if v == "accepted" else v for v in verdicts]
            self._close(submission.lease, node_id, verdicts, len(held.lease.tasks))
            self._note_problems(node_id, problems)
            self._lose(held.number, "rejected" if "rejected" in verdicts else "void")
            self._count_void(held.number, problems)
        return dict(zip((e.id for e in submission.episodes), verdicts, strict=False))

    async def _verdicts(self, lease: Lease, episodes: tuple[Episode, ...]) -> tuple[list[str], list[str]]:
        verdicts, problems = [], []
        for index, episode in enumerate(episodes[: len(lease.tasks)]):
            if episode.outcome == "void":
                verdicts.append("void")
                problems.append(episode.void_reason)
                continue
            problem = mismatch(episode, lease, index, self.published)
            problem = problem or await rescored(episode, self._envs[episode.task.env])
            verdicts.append("rejected" if problem else "accepted")
            if problem:
                problems.append(problem)
        return verdicts, problems

    def _close(self, lease_id: str, node_id: str, verdicts: list[str], rollouts: int) -> None:
        counts = Counter(verdicts)
        void = rollouts - counts["accepted"] - counts["rejected"]
        closed = self.book.finish(
            lease_id, node_id, accepted=counts["accepted"], rejected=counts["rejected"], void=void
        )
        assert closed and self.book.is_conserved

    def _note_problems(self, node_id: str, problems: list[str]) -> None:
        for problem, count in Counter(problems).items():
            self._run.event("rollout.refused", node_id, reason=problem[:500], count=count)

    def _count_void(self, number: int, problems: list[str]) -> None:
        self._void_attempts[number] += 1
        if self._void_attempts[number] >= MAX_VOID_ATTEMPTS:
            reason = problems[0] if problems else "episodes were missing"
            self.failure = RunError(
                f"group {number} failed {MAX_VOID_ATTEMPTS} times, last because {reason}",
                "Mend the environment or the workers; then continue with --resume.",
            )

    def tick(self, now: float) -> None:
        """End leases that show no progress."""
        for holding in self.book.expire(now):
            self._run.event("lease.expired", holding.node_id, lease=holding.lease_id)
            self._release(holding.lease_id, "expired")

    def node_left(self, node_id: str, reason: str) -> None:
        """A worker said goodbye or died: its leases end now."""
        for holding in self.book.void_node(node_id):
            self._run.event("lease.void", node_id, lease=holding.lease_id, reason=reason)
            self._release(holding.lease_id, reason)

    def _release(self, lease_id: str, reason: str) -> None:
        held = self._leased.pop(lease_id)
        if held.round is not None:
            held.round.lost(lease_id)
        elif held.number is not None:
            self._lose(held.number, reason)

    def _lose(self, number: int, reason: str) -> None:
        self.queue.lost(number)
        self._journal.note("lost", number)
        self.lost[reason] += 1

    # The learner

    def batch(self, version: int) -> BatchReply:
        """The batch that makes `version` + 1, if it can be had now."""
        if self.ended:
            return BatchReply(version=version, ended=True)
        self.version = max(self.version, version)
        if version >= self.config.run.steps:
            return BatchReply(version=version)
        kept = self._journal.batch(version)
        if kept is not None:
            return BatchReply(version=version, episodes=kept)
        numbers, swept = self.queue.take(version)
        self._journal.sweep(swept)
        if swept:
            self._run.event("rollout.swept", groups=len(swept), step=version)
        if numbers is None:
            return BatchReply(version=version)
        control = self.config.run.seed if self.config.rollout.shuffle_rewards else None
        episodes = self._journal.form_batch(version, numbers, shuffle_seed=control)
        by_worker = Counter(self.name_of(e.worker) for e in episodes)
        self._consumed_by.update(by_worker)
        staleness = Counter(version - e.version for e in episodes)
        self._batch_facts = {f"staleness/{k}": n for k, n in sorted(staleness.items())}
        self._batch_facts |= {f"rollouts/{name}": n for name, n in sorted(by_worker.items())}
        self._run.write_atomic("workers.json", json.dumps(self._consumed_by).encode())
        self.max_staleness_seen = max(self.max_staleness_seen, *(version - e.version for e in episodes))
        if self.config.output.keep_episodes:
            lines = b"".join(to_json(e) + b"\n" for e in episodes)
            self._run.write_atomic(f"episodes/{version:06d}.jsonl", lines)
        return BatchReply(version=version, episodes=episodes)

    def stepped(self, report: StepReport, extra: Mapping[str, Any]) -> None:
        """The learner finished a step (or, with version 0, published the untouched model)."""
        self.version = max(self.version, report.version)
        if report.version > self._logged_step and report.metrics:
            self._logged_step = report.version
            self._run.metric(kind="step", step=report.version, **report.metrics, **extra, **self._batch_facts)
        if report.manifest is not None:
            self._publish(report.version)
        if report.checkpointed:
            self._journal.forget_batches(report.version)

    def _publish(self, version: int) -> None:
        self.published = max(self.published, version)
        if self._eval_due(version) and version not in self.rounds and version not in self.results:
            self.rounds[version] = EvalRound(version, self._heldout)

    def _finish_round(self, round_: EvalRound) -> None:
        if not round_.done:
            return
        self.results[round_.version] = result = round_.result()
        self._run.metric(kind="eval", version=round_.version, **result)
        del self.rounds[round_.version]
        answers = [
            {
                "question": e.turns[0].observation if e.turns else "",
                "answer": e.turns[-1].completion.text if e.turns else "",
                "strict": strict,
                "lenient": lenient,
                "task": builtins(e.task),
            }
            for e, (strict, lenient) in zip(
                (round_.answers[i] for i in range(len(round_.tasks))), round_.marks(), strict=True
            )
        ]
        text = json.dumps({"version": round_.version, "result": result, "answers": answers}, ensure_ascii=False)
        self._run.write_atomic(f"evals/{round_.version:06d}.json", text.encode())

    # Views and restoring

    def answers(self, version: int) -> list[dict[str, Any]]:
        """What was answered in the evaluation of `version`, question by question."""
        text = self._load(f"evals/{version:06d}.json", '{"answers": []}')
        return list(json.loads(text)["answers"])

    @property
    def consumed_by(self) -> Counter[str]:
        """Rollouts that trained the policy, by worker."""
        return self._consumed_by

    def _load(self, name: str, default: str) -> str:
        path = self._run.path / name
        return path.read_text() if path.exists() else default

    def _load_results(self) -> dict[int, dict[str, float]]:
        (self._run.path / "evals").mkdir(exist_ok=True)
        found = (json.loads(p.read_text()) for p in sorted((self._run.path / "evals").glob("*.json")))
        return {int(one["version"]): one["result"] for one in found}

    def _last_logged_step(self) -> int:
        last = 0
        for line in self._load("metrics.jsonl", "").splitlines():
            try:
                last = max(last, int(json.loads(line).get("step", 0)))
            except ValueError:
                continue  # the half line of a killed writer
        return last

